"""Whether a change of the code changed a number: every kind of run, before and after, compared bit for bit.

    python -m benchmarks.same_numbers --before ../old-checkout --keep runs/same

trains each case (`--list`) twelve updates with the atesd of either checkout, in the same interpreter with one thread,
and compares the newest checkpoint and the trained model tensor by tensor, and every row of the run but its times.
With `--keep` the runs of the side before are kept and used again as long as its sources and the case are the same.
Exit code: 0 equal, 1 a difference, 2 the side before could not be run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.same.cases import CUT, Case, all_cases, with_needs
from benchmarks.same.child import run_job
from benchmarks.same.compare import compare_runs, fingerprint
from benchmarks.same.tables import copied_runs, page_differences, pages, reproduce

ROOT = Path(__file__).resolve().parents[1]
MATERIAL = Path(__file__).with_name("same") / "material.py"


@dataclass(frozen=True, slots=True)
class Side:
    """A checkout, where its runs go, and the folder of models and problems that both sides read."""

    checkout: Path
    runs: Path
    material: Path
    recorded: Path | None = None
    is_after: bool = False

    @property
    def source(self) -> Path:
        """What goes on PYTHONPATH."""
        return self.checkout / "src"

    def run(self, case: Case) -> Path:
        """The run folder of a case."""
        return self.runs / case.key(all_cases())

    def job(self, case: Case) -> dict[str, Any]:
        """What the child is told."""
        settings = case.settings_after if self.is_after else case.settings
        return {
            "name": case.name,
            "recipe": self._filled(case.recipe, case),
            "settings": [self._filled(setting, case) for setting in settings],
            "recorded": str(self.recorded / self.run(case).name) if self.recorded else None,
            "out": str(self.run(case)),
            "cut": CUT if case.resumed and self.is_after else None,
        }

    def environment(self) -> dict[str, str]:
        """Of a child: this side's atesd, one thread, no network, no warnings."""
        own = {"PYTHONPATH": f"{self.source}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **own, "PYTHONWARNINGS": "ignore"}

    def _filled(self, text: str, case: Case) -> str:
        text = text.replace("{material}", str(self.material))
        for name in case.needs:
            text = text.replace(f"{{run:{name}}}", str(self.run(all_cases()[name])))
        return text


@dataclass(frozen=True, slots=True)
class Ended:
    """How a case ended on a side."""

    seconds: float
    error: str | None
    kept: bool = False


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, compare, print a row per case."""
    asked = arguments().parse_args(words)
    cases = chosen(asked.only, asked.real)
    if asked.list:
        print("\n".join(case.name for case in cases))
        return 0
    with kept_in(asked.keep) as folder:
        material = made_material(folder)
        before = Side(asked.before.resolve(), folder / f"before-{digest_of(asked.before)}", material)
        recorded = before.runs if asked.recorded else None
        after = Side(asked.after.resolve(), folder / "after", material, recorded, is_after=True)
        return compare_tables(before, after) if asked.tables else compare_cases(cases, before, after, asked)


def compare_cases(cases: Sequence[Case], before: Side, after: Side, asked: argparse.Namespace) -> int:
    """Every case on both sides. Returns the exit code."""
    print(f"{len(cases)} cases; before: {before.checkout}, after: {after.checkout}", flush=True)
    ends = [train_side(side, cases, asked.jobs, asked.one_process_per_case) for side in (before, after)]
    for name, side in zip(("before", "after"), ends, strict=True):
        trained = [end.seconds for end in side.values() if not end.kept]
        print(f"{name}: {len(trained)} cases trained in {sum(trained):.0f} s, {len(side) - len(trained)} kept")
    print(f"\n{'case':34} {'rows':>5} {'numbers':>9} {'tensors':>7}  verdict")
    verdicts = [report(case, before, after, *(end[case.name] for end in ends)) for case in cases]
    tell_twins(cases, after, verdicts)
    print(f"{verdicts.count('equal')} of {len(verdicts)} cases are equal")
    broken = [case.name for case in cases if ends[0][case.name].error is not None]
    return 2 if broken else int(any(verdict != "equal" for verdict in verdicts))


def compare_tables(before: Side, after: Side) -> int:
    """What `atesd reproduce` writes on both sides, and after the change from the runs before it. The exit code."""
    old, new = before.runs / "tables", after.runs / "tables"
    if not old.with_suffix(".done").exists():
        write_tables(before, old)
        old.with_suffix(".done").touch()
    shutil.rmtree(new, ignore_errors=True)
    failed = 0
    for what, folder in (("runs of its own", new), ("the runs before", after.runs / "tables-of-runs-before")):
        if folder != new:
            copied_runs(old, folder)
        try:
            write_tables(after, folder)
            differences = page_differences(pages(old), pages(folder))
        except RuntimeError as problem:
            differences = [str(problem)]
        verdict = "\n  ".join(differences) or "equal, byte for byte"
        print(f"{len(pages(old))} pages and figures, after the change from {what}: {verdict}", flush=True)
        failed |= bool(differences)
    return failed


def write_tables(side: Side, folder: Path) -> None:
    """Train a toy reproduction in `folder`, or go on with what is there, and write its pages."""
    folder.mkdir(parents=True, exist_ok=True)
    reproduce(folder, side.environment())


def report(case: Case, before: Side, after: Side, old: Ended, new: Ended) -> str:
    """Compare a case and print its row. Returns the verdict."""
    for name, end in (("before", old), ("after", new)):
        if end.error is not None:
            print(f"{case.name:34} {'':5} {'':9} {'':7}  fails {name}: {end.error}", flush=True)
            return "fails"
    found = compare_runs(before.run(case), after.run(case))
    print(f"{case.name:34} {found.rows:5} {found.numbers:9,} {found.tensors:7}  {found.verdict}", flush=True)
    return found.verdict


def tell_twins(cases: Sequence[Case], side: Side, verdicts: Sequence[str]) -> None:
    """Name the cases that came out as another did: what they set changes no number on either side."""
    first: dict[str, str] = {}
    for case, verdict in zip(cases, verdicts, strict=True):
        if case.resumed or verdict != "equal":
            continue
        other = first.setdefault(fingerprint(side.run(case)), case.name)
        if other != case.name:
            print(f"note: {case.name} came out as {other} did: no number depends on what it sets")


def train_side(side: Side, cases: Sequence[Case], jobs: int, apart: bool) -> dict[str, Ended]:
    """Train the cases of one side, `jobs` children at a time; those kept from an earlier comparison are not run."""
    side.runs.mkdir(parents=True, exist_ok=True)
    kept = {} if side.is_after else {case.name: end for case in cases if (end := kept_end(side.run(case)))}
    shares = shared_out([case for case in cases if case.name not in kept], jobs)
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        found = list(pool.map(lambda share: list((apart_ends if apart else child_ends)(side, share)), shares))
    return {**kept, **{name: end for share in found for name, end in share}}


def shared_out(cases: Sequence[Case], jobs: int) -> list[list[Case]]:
    """The cases in `jobs` parts; those that read another's run are in the part of that one, after it."""
    parts: list[list[Case]] = [[] for _ in range(jobs)]
    where: dict[str, int] = {}
    for number, case in enumerate(cases):
        where[case.name] = next((where[name] for name in case.needs if name in where), number % jobs)
        parts[where[case.name]].append(case)
    return [part for part in parts if part]


def child_ends(side: Side, cases: Sequence[Case]) -> Iterator[tuple[str, Ended]]:
    """Train cases in one child, one after the other. Raises `RuntimeError` if the child ends before they do."""
    log = (side.runs / "stderr.txt").open("a", encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.same.child", str(side.source)]
    with (
        log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=side.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        for case in cases:
            child.stdin.write(json.dumps(side.job(case)) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
            if not line:
                raise RuntimeError(
                    f"the child of {side.checkout} ended at {case.name}; its last words are in {log.name}"
                )
            told = json.loads(line)
            yield case.name, noted(side.run(case), told["seconds"], told["error"])
        child.stdin.close()


def apart_ends(side: Side, cases: Sequence[Case]) -> Iterator[tuple[str, Ended]]:
    """Train each case by the command line, in a process of its own."""

    def train(job: dict[str, Any]) -> None:
        recipe, settings, out = job["recipe"], job["settings"], Path(job["out"])
        words = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-W", "ignore", "-m", "atesd.cli", "train", recipe, *words, "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, env=side.environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])

    for case in cases:
        begun, error = time.perf_counter(), None
        try:
            run_job(side.job(case), train)
        except RuntimeError as problem:
            error = str(problem)
        yield case.name, noted(side.run(case), time.perf_counter() - begun, error)


def noted(run: Path, seconds: float, error: str | None) -> Ended:
    """The end of a run, noted beside it if it is whole."""
    if error is None:
        run.with_suffix(".done").write_text(str(seconds), "ascii")
    return Ended(seconds, error)


def kept_end(run: Path) -> Ended | None:
    """The end of a run of an earlier comparison; None if there is none."""
    done = run.with_suffix(".done")
    return Ended(float(done.read_text("ascii")), None, kept=True) if done.exists() and run.is_dir() else None


def chosen(names: str | None, real: bool) -> list[Case]:
    """The named cases with those they read, or all; those of a real model only where asked for."""
    cases = all_cases()
    asked = names.split(",") if names else [name for name, case in cases.items() if real or not case.real]
    unknown = [name for name in asked if name not in cases]
    if unknown:
        sys.exit(f"--only {','.join(unknown)}: no such case; --list names them all")
    return with_needs(asked, cases)


class kept_in:  # noqa: N801 - reads as a function
    """The folder of all runs: `--keep`, or a temporary one that is deleted afterwards."""

    def __init__(self, keep: Path | None) -> None:
        self._keep = keep
        self._folder = keep.resolve() if keep else Path(tempfile.mkdtemp(prefix="same-numbers-"))

    def __enter__(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def __exit__(self, *_: object) -> None:
        if self._keep is None:
            shutil.rmtree(self._folder)


def made_material(folder: Path) -> Path:
    """The models and problems of the text cases, made if they are not there."""
    path = folder / f"material-{hashlib.sha256(MATERIAL.read_bytes()).hexdigest()[:8]}"
    if not path.is_dir():
        unfinished = path.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.same.material", str(unfinished)]
        subprocess.run(command, cwd=ROOT, check=True)
        unfinished.rename(path)
    return path


def digest_of(checkout: Path) -> str:
    """A hash of a checkout's sources, and of all else that its numbers depend on: packages, models, problems."""
    total = hashlib.sha256(f"{sys.version} {[metadata.version(name) for name in ('torch', 'transformers')]}".encode())
    for own in (MATERIAL, MATERIAL.with_name("exposure.py")):
        total.update(own.read_bytes())
    for path in sorted(files_of(checkout / "src" / "atesd")):
        total.update(str(path.relative_to(checkout)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def files_of(folder: Path) -> Iterable[Path]:
    """Every file but compiled ones. Raises `SystemExit` if the folder is no checkout of atesd."""
    if not folder.is_dir():
        sys.exit(f"{folder}: no such folder; expected a checkout with src/atesd")
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_numbers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--before", type=Path, required="--list" not in sys.argv, help="checkout before the change")
    parser.add_argument("--after", type=Path, default=Path(), help="checkout after the change; default: here")
    parser.add_argument("--only", metavar="NAME,...", help="these cases, and those whose runs they read")
    parser.add_argument("--list", action="store_true", help="name the cases, and stop")
    parser.add_argument("--jobs", type=int, default=1, help="children at a time, one thread each")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs here, and use those before again")
    parser.add_argument(
        "--recorded", action="store_true", help="after: train what the runs before recorded, not the cases' settings"
    )
    parser.add_argument("--real", action="store_true", help="also the cases of SmolLM2, fetched first")
    parser.add_argument("--one-process-per-case", action="store_true", help="by `atesd train`, a process each")
    parser.add_argument(
        "--tables", action="store_true", help="compare what `atesd reproduce` writes, in place of cases"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
