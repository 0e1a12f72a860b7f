"""An exposure in words, the same in every table and card. Imports no torch: the report reads it."""

from __future__ import annotations

from atesd.config import CREDIT_PRESETS, Config


def method_name(config: Config) -> str:
    """What was trained, in the words of the papers: OPSD, ATESD, a fixed ratio, a baseline or a control."""
    if config.train.method != "distill":
        return config.train.method.upper()
    exposure = config.exposure
    words = {
        "full": "OPSD (full exposure)",
        "fixed": f"fixed ratio {exposure.reveal_ratio:g}",
        "random": "random ratio",
        "schedule": f"{exposure.schedule} schedule {exposure.schedule_start:g} to {exposure.schedule_end:g}",
        "replay": f"replay ({exposure.replay_order})",
        "learned": f"ATESD ({_credit(config)})",
        "aligned": "aligned ratio per " + exposure.granularity.removeprefix("per_"),
        "bandit": f"bandit over {config.bandit.arms} ratios ({_credit(config)})",
        "setpoint": f"set-point on KL ({_target(config)})",
        "per_problem": "search " + exposure.granularity.replace("_", " "),
        "custom": f"custom ({exposure.factory})",
    }
    extras = [f"control: {exposure.control}"] if exposure.control != "off" else []
    if config.train.grpo_weight:
        extras.append(f"plus {config.train.grpo_weight:g} x GRPO")
    if config.loss.token_gate != "none":
        extras.append(_gate(config))
    extras += ["shuffled rewards"] if exposure.decides and config.credit.shuffle_rewards else []
    return ", ".join([words[exposure.kind], *extras])


def _credit(config: Config) -> str:
    """The preset of the reward, with the progress signal where it is not the preset's own."""
    preset, signal = config.credit.preset, config.credit.progress_signal
    own = signal == CREDIT_PRESETS[preset]["progress_signal"]
    return f"{preset} credit" if own else f"{preset} credit, {signal}"


def _gate(config: Config) -> str:
    loss = config.loss
    words = {
        "aligned": f"aligned tokens ({config.aligned.success})",
        "correct": "verified rollouts only",
        "random": f"{loss.gate_share:.0%} of the tokens, at random",
        "disagreement": f"the {loss.gate_share:.0%} of the tokens with the {_most(config)} KL",
        "entropy": f"the {loss.gate_share:.0%} of the tokens with the {_most(config)} entropy",
    }
    return words[loss.token_gate]


def _most(config: Config) -> str:
    return {"high": "largest", "low": "smallest"}[config.loss.gate_side]


def _target(config: Config) -> str:
    target = config.setpoint.target_kl
    return "its first" if target is None else f"{target:g} nats"
