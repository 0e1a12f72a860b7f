"""A run from its config to its folder: train, resume, evaluate. The functions that a notebook calls.

config = load_config("micro", ["train.num_updates=50"])
outcome = train(config, Path("runs/first"))
row = evaluate(config, split="test")
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Literal

import torch

from atesd.build import build, close
from atesd.config import Config, dump_config
from atesd.engine.factory import engine_note
from atesd.errors import RunError
from atesd.models.load import merging_note
from atesd.models.processor import attention_note
from atesd.models.prompts import control_line, spelling_control_tokens
from atesd.models.ranks import Ranks, process_group
from atesd.records import Split
from atesd.rows import EvaluationRow
from atesd.runs import EndStatus, RunFolder, leave_token, new_manifest, recorded_factories, sees_token
from atesd.train.checkpoint import load_newest, no_rows
from atesd.train.components import Components
from atesd.train.listeners import Listener, Listeners, RunInfo
from atesd.train.loop import Trainer

TOKEN_PATIENCE = 20.0
"""Seconds that a file may take to appear on another machine: NFS believes what it knows of a folder for a while."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `train` ended."""

    run: RunFolder
    status: Literal["finished", "stopped"]


def train(
    config: Config,
    out: Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    listeners: Sequence[Listener] = (),
    command: Sequence[str] = (),
) -> Outcome:
    """Train in the run folder `out`, from its newest valid checkpoint if it has one.

    Under torchrun every rank calls it with the same arguments; rank 0 alone writes and tells the listeners. Raises
    `RunError` if another process owns the folder or its recorded config differs, and whatever `build` raises.
    """
    with process_group(config.model.device) as ranks:
        listener = Listeners(listeners if ranks.first else ())
        _require_one_folder(ranks, out)
        known = ranks.broadcast(partial(_is_known, config, out, resume))
        if known:
            config = RunFolder.open(out).continued(config)
        components = build(config, ranks=ranks)
        words = list(command) or sys.argv
        try:
            ranks.require_equal(partial(_identity, components), "config and data")
            run = RunFolder(out, ranks.broadcast(partial(_run_id, components, out, known, words)))
            with ExitStack() as held:
                ranks.broadcast(partial(_hold, held, run))
                return _train_watched(Trainer(components, run, listener), known, words, listener)
        finally:
            close(components)


def evaluate(config: Config, split: Split = "test", *, update: int = 0) -> EvaluationRow:
    """Average@k of the configured model on a split of the configured problems, as a row of evaluations.jsonl.

    `update` is what the row is labelled with: how many updates the model has behind it.
    """
    with process_group(config.model.device) as ranks:
        components = build(config, ranks=ranks)
        try:
            return components.evaluation.evaluate(split, update)
        finally:
            close(components)


def config_of_trained(run: RunFolder) -> Config:
    """The config of a run with its trained model in place of the initial one; `RunError` if it is not finished."""
    if not run.final.is_dir():
        raise RunError(f"{run.path} has no trained model yet ({run.final.name}/ is missing); let `atesd train` finish")
    config = run.config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(run.final), "lora": None})})


def _require_one_folder(ranks: Ranks, out: Path) -> None:
    """Every rank sees the folder that rank 0 writes, which is found out before anything is loaded: `RunError`."""
    if ranks.size == 1:
        return
    token = ranks.broadcast(partial(leave_token, out))
    try:
        seen = ranks.gather(lambda: [gethostname(), str(out.absolute()), sees_token(token, TOKEN_PATIENCE)])
    finally:
        if ranks.first:
            with suppress(OSError):  # an empty file more, in a folder that then refuses everything else too
                Path(token).unlink()
    host, folder, _ = seen[0]
    blind = [f"rank {rank} on {there} ({path})" for rank, (there, path, sees) in enumerate(seen) if not sees]
    if blind:
        raise RunError(
            f"{', '.join(blind)} does not see the run folder that rank 0 on {host} writes ({folder}): a file made "
            f"there did not appear within {TOKEN_PATIENCE:g} seconds. Give --out as an absolute path on a file system "
            "that all machines share, mounted at the same place"
        )


def _is_known(config: Config, out: Path, resume: Literal["auto", "never"]) -> bool:
    """Whether `out` holds a run, which is then to be resumed. What forbids it is said before a model is loaded."""
    known = RunFolder.exists(out)
    if known and resume == "never":
        raise RunError(f"{out} already holds a run; choose another --out, or resume it with --resume auto")
    if known:
        run = RunFolder.open(out)
        with run.lock():
            run.check_config(config)
    return known


def _identity(components: Components) -> tuple[str, str, object]:
    """What all ranks must have read alike."""
    return dump_config(components.config), components.problems.fingerprint, recorded_factories(components.config)


def _run_id(components: Components, out: Path, known: bool, command: Sequence[str]) -> str:
    """The id of the run in `out`, begun there unless it is known."""
    if known:
        run = RunFolder.open(out)
        run.check_data(components.problems.fingerprint, components.problems.files)
        return run.run_id
    manifest = new_manifest(
        components.config,
        data_fingerprint=components.problems.fingerprint,
        command=command,
        threads=torch.get_num_threads(),
        ranks=components.loaded.ranks.size,
    )
    problems = components.problems
    rows = {
        "data_files": dict(problems.files),
        "skipped_rows": list(problems.skipped),
        "data_notes": list(problems.notes),
    }
    return RunFolder.create(out, components.config, {**manifest, **rows}).run_id


def _hold(held: ExitStack, run: RunFolder) -> None:
    """Take the folder's lock for as long as `held` is open."""
    held.enter_context(run.lock())


def _train_watched(trainer: Trainer, known: bool, command: Sequence[str], listener: Listeners) -> Outcome:
    """Tell the listeners when the session begins and how it ends."""
    run = trainer.run
    status: EndStatus = "failed"
    if trainer.components.loaded.ranks.first:
        listener.begin(trainer.components.config, RunInfo(run.path, run.run_id, run.manifest, resumed=known))
    try:
        outcome = _train_locked(trainer, known, command, listener)
        status = outcome.status
        return outcome
    finally:
        listener.end(status)


def _train_locked(trainer: Trainer, known: bool, command: Sequence[str], listener: Listeners) -> Outcome:
    run, config, ranks = trainer.run, trainer.components.config, trainer.components.loaded.ranks
    if known and ranks.broadcast(partial(_nothing_is_left, run, config)):
        listener.message(f"{run.path} is finished: nothing is left to train, and nothing was written")
        return Outcome(run, "finished")
    updates_done = trainer.resume()
    if known:
        begin = partial(
            run.begin_session,
            config,
            command=command,
            updates_done=updates_done,
            threads=torch.get_num_threads(),
            ranks=ranks.size,
        )
        for note in ranks.broadcast(begin):
            listener.message(note)
        listener.message(f"resumed after update {updates_done} of {config.train.num_updates}")
    for note in _notes(trainer.components):
        listener.message(note)
    try:
        status = trainer.train(updates_done)
    except BaseException:
        if ranks.first:
            with suppress(RunError):  # what ended the training is what matters, and may be why this cannot be written
                run.end_session("failed")
        raise
    ranks.broadcast(partial(run.end_session, status))
    return Outcome(run, status)


def _nothing_is_left(run: RunFolder, config: Config) -> bool:
    """Whether a session would change nothing: finished and whole, with its model, under these very settings.

    A run of which anything is damaged or gone is left to the resume, which says so or mends it.
    """
    if run.manifest["status"] != "finished" or not run.final.is_dir() or dump_config(run.config) != dump_config(config):
        return False
    with suppress(RunError):
        run.require_rows()  # which lets rows be added, as `atesd evaluate` does
        scores, recorded, written = run.rows("evaluations"), run.manifest.get("rows"), run.rows_written()
        if not recorded or any(written[kind] != recorded[kind] for kind in ("metrics", "decisions", "samples")):
            return False
        newest = load_newest(run.checkpoints, run.run_id, no_rows)
        twice = any(row in scores[:place] for place, row in enumerate(scores))
        return newest is not None and newest.updates_done == config.train.num_updates and not (newest.skipped or twice)
    return False


def _notes(components: Components) -> Iterator[str]:
    """What a user should know of a run before it begins."""
    config, problems = components.config, components.problems
    choice = engine_note(components.loaded, config.sampling.engine)
    if choice is not None:
        yield choice
    yield from filter(None, (attention_note(config.model), merging_note(config.model)))
    if config.model.dtype == "bfloat16" and config.model.lora is None:
        yield (
            "model.dtype: bfloat16 without model.lora: whatever changes a weight by less than its rounding (about "
            "1/256) is lost, most of an update at usual learning rates; set model.lora, or model.dtype: float32, with "
            "model.sharding: full and model.compute_dtype: bfloat16 where the passes are to stay in bfloat16"
        )
    if not components.scorer.has_separable_head:
        yield (
            f"{type(components.loaded.model).__name__}: no known scale or soft cap of its output head gives its own "
            "logits, so these are kept whole, in the model's dtype; lower train.micro_batch_size if memory runs out"
        )
    yield from problems.notes
    if spelling_control_tokens(problems.train, components.encoder):
        yield control_line(problems.train, components.encoder)
    if problems.skipped:
        yield f"{len(problems.skipped)} rows skipped; manifest.json lists them all, the first is: {problems.skipped[0]}"
