"""The demo's training now and before: two of its runs, shortened, at this commit and at an earlier one, in turns.

Every run is a process of its own that imports atesd from this checkout or from the earlier one, and measures the CPU
time of `train` alone: loading the model, updates, evaluations, checkpoints; not the imports.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from atesd.config import load_config
from atesd.session import train
from benchmarks.children import ROOT, in_child
from benchmarks.harness import Case, Goal, Result, Settings, ratio, single

BEFORE = "f8cb0f7"
ARMS: dict[str, tuple[str, str]] = {
    "steps, OPSD": ("micro-steps", "exposure.kind=full"),
    "leaps, ATESD": ("micro", "exposure.kind=learned"),
}
SMALL = (
    "train.num_updates=1",
    "train.batch_size=4",
    "data.train_size=16",
    "data.test_size=4",
    "data.validation_size=4",
    "data.probe_size=4",
    "sampling.completion_tokens=8",
)


def train_arms(overrides: list[str]) -> dict[str, dict[str, Any]]:
    """For a fresh process: CPU seconds of each arm, and its last test score with its interval."""
    found: dict[str, dict[str, Any]] = {}
    for name, (recipe, exposure) in ARMS.items():
        config = load_config(recipe, [exposure, *overrides])
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            run = train(config, Path(folder) / "run").run
            seconds = time.process_time() - begun
            scores = [row["average"] for row in run.rows("evaluations") if row["split"] == "test"]
        found[name] = {"seconds": seconds, "score": scores[-1]}
    return found


def unpack(commit: str, folder: Path) -> Path:
    """The source of an earlier commit under `folder`. Raises `subprocess.CalledProcessError` where git lacks it."""
    packed = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def run(settings: Settings) -> Result:
    """Both commits in turns; the scores must lie within each other's intervals."""
    overrides = (
        [f"train.num_updates={50 if settings.size == 'full' else 10}"] if settings.size != "small" else list(SMALL)
    )
    if settings.size == "small":
        found = [{"before": train_arms(overrides), "now": train_arms(overrides)}]
    else:
        with tempfile.TemporaryDirectory() as folder:
            sources = {"before": unpack(BEFORE, Path(folder)), "now": ROOT / "src"}
            found = [
                {version: in_child(train_arms, source, overrides=overrides) for version, source in sources.items()}
                for _ in range(settings.rounds)
            ]
    rounds = [
        {f"{arm}, {version}": arms[arm]["seconds"] for arm in ARMS for version, arms in row.items()} for row in found
    ]
    totals = [{version: sum(arms[arm]["seconds"] for arm in ARMS) for version, arms in row.items()} for row in found]
    scores = {
        f"{arm}, {version}": {key: found[0][version][arm]["score"][key] for key in ("value", "low", "high")}
        for arm in ARMS
        for version in found[0]
    }

    def kept(arm: str) -> bool:
        before, now = scores[f"{arm}, before"], scores[f"{arm}, now"]
        return bool(before["low"] <= now["value"] <= before["high"])

    goals = [
        Goal(f"training of two runs of the demo, now over {BEFORE}", "at most", 0.7, ratio(totals, "now", "before")),
        Goal("demo: test scores within the earlier intervals, of two", "at least", 2, single(sum(map(kept, ARMS))), ""),
    ]
    cases = [
        Case(f"demo, CPU time of training, {overrides[0]}", rounds, figures=scores),
        Case("demo, both arms together", totals),
    ]
    return Result("demo", cases, goals)
