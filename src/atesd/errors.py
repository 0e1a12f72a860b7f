"""Errors that a user can act on.

Each message names the setting, file or row, the value found, what is allowed, and the likely fix. Violated
preconditions inside the maths raise plain `ValueError`.
"""


class AtesdError(Exception):
    """Base of every error that `atesd` reports to its user without a traceback."""


class ConfigError(AtesdError):
    """A setting is unknown, ill-typed, out of range, or contradicts another one."""


class IdleSettingError(ConfigError):
    """Settings are written that nothing would read under the kinds that are chosen; `paths` are theirs."""

    def __init__(self, message: str, paths: tuple[str, ...]) -> None:
        super().__init__(message)
        self.paths = paths


class DataError(AtesdError):
    """A row, file or data set cannot be used as it is."""


class ModelError(AtesdError):
    """A model or tokenizer lacks something that training needs."""


class EngineError(AtesdError):
    """A rollout server is not there, fails, answers nonsense, or does not have the student's weights."""


class RunError(AtesdError):
    """A run folder is locked, foreign, or not in the state a command expects."""


class CheckpointError(AtesdError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TrainingError(AtesdError):
    """Training cannot go on: non-finite numbers three times in a row, or no usable rollout."""


class LostRankError(TrainingError):
    """Another rank has failed, has ended, or no longer answers."""


class NonFiniteError(TrainingError):
    """The model gave numbers that are not finite before its step began; a trainer may skip the update."""
