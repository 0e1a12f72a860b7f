"""Plans, their cells, and the runner that trains them: what is refused, in which order, what a kill costs."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from atesd.config import load_config
from atesd.errors import ConfigError, RunError
from atesd_lab.cli import worker
from atesd_lab.cli.sweep import LiveSweep, PlainSweep, SweepProgress
from atesd_lab.sweep import jobs, workers
from atesd_lab.sweep.grid import command_lines, scores, write_shared
from atesd_lab.sweep.jobs import Entry, Job, run_all
from atesd_lab.sweep.plan import Cell, Plan, cells_of, load_plan, plan_from_mapping, plan_names, stages
from atesd_lab.sweep.workers import Ending, slots, visible_gpus
from fake_run import begin_run, fake_config, metric_row, write_fake_run
from quick import SWEPT_ARMS

OUT = Path("out")


def plan(**changes: Any) -> Plan:
    return plan_from_mapping({"recipe": "micro", **changes}, "mine.yaml")


def replay(arm: str) -> dict[str, Any]:
    """The setting that replays the run of an arm."""
    return {"exposure.replay_run": {"cell": {"arm": arm}}}


def cells(out: Path = OUT, **changes: Any) -> list[Cell]:
    return cells_of(plan(**changes), out, "mine.yaml")


def names(found: list[Cell]) -> list[str]:
    return [cell.job.name for cell in found]


# Plans


def test_cells_are_all_points_of_all_axes_with_all_seeds():
    axes = {"world": {"leaps": {}, "steps": {"recipe": "micro-steps"}}, "exposure.reveal_ratio": [0, 0.25]}
    found = cells(axes=axes, seeds=[0, 7], set={"exposure.kind": "fixed"})
    assert names(found) == [
        f"{world}-reveal_ratio-{ratio}-seed-{seed}"
        for seed in (0, 7)
        for world in ("leaps", "steps")
        for ratio in ("0", "0.25")
    ]
    last = found[-1]
    assert last.points == {"world": "steps", "exposure.reveal_ratio": "reveal_ratio-0.25"}
    config = last.job.config
    expected = ["exposure.kind=fixed", "exposure.reveal_ratio=0.25", "train.seed=7"]
    assert config == load_config("micro-steps", expected)


def test_a_plan_without_axes_is_its_recipe_with_each_seed():
    assert names(cells(seeds=2)) == ["seed-0", "seed-1"]
    assert [cell.group for cell in cells(seeds=2)] == ["micro", "micro"]


def test_a_new_point_or_seed_renames_no_cell():
    before = {cell.job.folder: cell.job for cell in cells(axes={"arm": SWEPT_ARMS}, seeds=2)}
    arms = {"first": {"exposure.kind": "random"}, **SWEPT_ARMS}
    after = {cell.job.folder: cell.job for cell in cells(axes={"arm": arms}, seeds=3)}
    assert before.items() <= after.items()


def test_a_cell_that_reads_another_comes_after_it_and_reads_the_one_of_its_own_seed():
    arms = dict(reversed(SWEPT_ARMS.items()))  # replay first
    found = cells(axes={"arm": arms}, seeds=2)
    place = {cell.job.name: index for index, cell in enumerate(found)}
    for seed in (0, 1):
        replay = found[place[f"replay-seed-{seed}"]]
        assert replay.job.needs == (OUT / f"sound-seed-{seed}",)
        assert replay.job.config.exposure.replay_run == f"out/sound-seed-{seed}"
        assert place[f"sound-seed-{seed}"] < place[f"replay-seed-{seed}"]
    assert [names(some) for some in stages(found)] == [
        ["sound-seed-0", "full-seed-0", "sound-seed-1", "full-seed-1"],
        ["replay-seed-0", "replay-seed-1"],
    ]


def test_a_needed_cell_may_have_another_seed():
    arms = {
        "sound": {},
        "replay": {**SWEPT_ARMS["replay"], "exposure.replay_run": {"cell": {"arm": "sound", "seed": 0}}},
    }
    needed = {cell.job.name: cell.job.needs for cell in cells(axes={"arm": arms}, seeds=2)}
    assert needed["replay-seed-1"] == (OUT / "sound-seed-0",)


def test_the_recorded_path_of_a_needed_cell_does_not_depend_on_how_out_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    outs = (Path("runs/x"), Path("./runs/../runs/x"), tmp_path / "runs" / "x")
    replayed = {cells(out, axes={"arm": SWEPT_ARMS})[-1].job.config.exposure.replay_run for out in outs}
    assert replayed == {"runs/x/sound-seed-0"}


def test_exclude_leaves_out_combinations():
    axes = {"world": {"leaps": {}, "steps": {"data.leap_share": 0.0}}, "exposure.reveal_ratio": [0, 0.5, 1]}
    exclude = [{"world": "steps", "exposure.reveal_ratio": [0, 0.5]}, {"seed": 1, "world": "leaps"}]
    found = cells(axes=axes, seeds=2, exclude=exclude, set={"exposure.kind": "fixed"})
    kept = {("leaps", "0", 0), ("leaps", "0.5", 0), ("leaps", "1", 0), ("steps", "1", 0), ("steps", "1", 1)}
    assert names(found) == [
        f"{world}-reveal_ratio-{ratio}-seed-{seed}"
        for seed in (0, 1)
        for world in ("leaps", "steps")
        for ratio in ("0", "0.5", "1")
        if (world, ratio, seed) in kept
    ]


TUNING = ("aligned-tuning", "gates")


@pytest.mark.parametrize("name", TUNING)
def test_what_is_tuned_is_tuned_on_seeds_that_no_table_uses(name: str) -> None:
    assert {cell.seed for cell in cells_of(load_plan(name), OUT)} == {100, 101}


@pytest.mark.parametrize("name", [name for name in plan_names() if name not in TUNING])
def test_packaged_plans_have_at_least_five_paired_seeds_and_configs_that_hold(name: str):
    seeds: dict[tuple, list[int]] = {}
    for cell in cells_of(load_plan(name), OUT, name):
        arm = tuple(
            point for axis, point in sorted(cell.points.items()) if axis != "start"
        )  # checkpoints share seeds out
        seeds.setdefault(arm, []).append(cell.seed)
    assert len({tuple(sorted(listed)) for listed in seeds.values()}) == 1
    assert all(sorted(listed) == list(range(max(5, len(listed)))) for listed in seeds.values())


def test_the_exposure_plan_has_every_control():
    arms = {cell.group: cell.job.config for cell in cells_of(load_plan("micro-exposure"), OUT)}
    ours = {"sound", "paper", "shuffled-reward", "untrained", "shuffled-replay"}
    assert set(arms) == {"full", "fixed-0.75", "random", "linear-up", "linear-down"} | ours
    assert arms["shuffled-reward"].credit.shuffle_rewards
    assert arms["untrained"].policy.learning_rate == 0
    assert arms["shuffled-replay"].exposure.replay_order == "shuffled"


def test_overrides_of_the_command_line_reach_every_cell_and_replace_what_the_plan_sets():
    found = cells_of(load_plan("micro-exposure", ["train.num_updates=12"]), OUT)
    assert {cell.job.config.train.num_updates for cell in found} == {12}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": None}, "mine.yaml: recipe: None is not allowed; it should be a valid string"),
        ({"axis": {}}, "mine.yaml: axis: unknown key; did you mean axes.; allowed: recipe, set, axes, seeds, exclude"),
        ({"seeds": 0}, "seeds.*0 is not allowed; it should be greater than or equal to 1"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": [-1]}, "seeds.*-1 is not allowed"),
        ({"seeds": True}, "seeds.*True is not allowed"),
        ({"set": {"num_updates": 4}}, "set: 'num_updates' is no dotted setting"),
        ({"set": {"train.seed": 4}}, "set: train.seed belongs to `seeds`"),
        ({"set": {"recipe": "micro"}}, "set: 'recipe' is no dotted setting"),
        ({"set": {"train.nun_updates": 4}}, "cell seed-0: micro: train.nun_updates: unknown.*did you mean num_updates"),
        ({"recipe": "mirco"}, "mine.yaml: cell seed-0: 'mirco' is neither a file nor a recipe; did you mean micro"),
        ({"axes": {"arm": {}}}, "axes.arm: has no point"),
        ({"axes": {"arm": [1, 2]}}, "axes.arm: a list holds values of one setting, and 'arm' is none"),
        ({"axes": {"train.batch_size": {"a": {}}}}, "axes.train.batch_size: named points need an axis with a name"),
        ({"axes": {"train.seed": [1]}}, "axes.train.seed.*belongs to `seeds`"),
        ({"axes": {"seed": [1]}}, "axes.seed: seeds are no axis"),
        ({"axes": {"arm": {"Full": {}}}}, "axes.arm: 'Full' cannot name a folder everywhere"),
        ({"axes": {"arm": {"a/b": {}}}}, "axes.arm: 'a/b' cannot name a folder"),
        ({"axes": {"arm": {"a": {"x": 1}}}}, "axes.arm.a: 'x' is no dotted setting"),
        ({"axes": {"train.batch_size": [4, 4.0]}}, "4.0 gives the name batch_size-4 a second time"),
        (
            {"axes": {"a": {"x": {"data.seed": 1}}, "b": {"y": {"data.seed": 2}}}},
            "data.seed is decided twice, by axes.a and by axes.b",
        ),
        (
            {"set": {"train.batch_size": 8}, "axes": {"train.batch_size": [4]}},
            "train.batch_size is decided twice, by set and by axes.train.batch_size",
        ),
        ({"axes": {"a": {"x": {}, "x-y": {}}, "b": {"y-z": {}, "z": {}}}}, "both give the name x-y-z"),
        (
            {"axes": {"arm": SWEPT_ARMS}, "exclude": [{"arn": "full"}]},
            r"exclude\[0\]: there is no axis 'arn'; did you mean a",
        ),
        ({"axes": {"arm": SWEPT_ARMS}, "exclude": [{"arm": "ful"}]}, "axis arm has no point 'ful'; did you mean full"),
        ({"exclude": [{"seed": 3}]}, r"exclude\[0\]: seed 3 is not in the plan"),
        ({"exclude": [{}]}, "is empty, which would leave out everything"),
        ({"exclude": [{"seed": 0}]}, "exclude leaves no cell of 1"),
        ({"axes": {"arm": SWEPT_ARMS}, "exclude": [{"arm": "sound"}]}, r"replay_run: the cell .* is not in the plan"),
        ({"axes": {"arm": {"a": {"exposure.replay_run": {"cell": "b"}}}}}, "cell: 'b'; expected the axes that differ"),
        (
            {"axes": {"arm": {x: {"exposure.kind": "replay", **replay(y)} for x, y in ("ab", "ba")}}},
            "these cells wait for each other: a-seed-0, b-seed-0",
        ),
        (
            {"axes": {"arm": {**SWEPT_ARMS, "sound": {"train.num_updates": 5}}}},
            "cell replay-seed-0: train.num_updates: 100 is more than the 5 of the cell that it reads, sound-seed-0",
        ),
    ],
)
def test_a_mistake_in_a_plan_is_named_with_what_is_allowed(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        cells(**changes)
    assert str(caught.value).startswith("mine.yaml: ")


def test_an_unknown_plan_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="'micro-ratio' is neither a file nor a plan; did you mean micro-ratios"):
        load_plan("micro-ratio")


def test_a_plan_that_is_a_list_is_refused():
    with pytest.raises(
        ConfigError, match="expected a plan with the keys recipe, set, axes, seeds, exclude, without, f"
    ):
        plan_from_mapping([], "mine.yaml")


# Commands for a scheduler


def test_each_command_is_the_very_cell_with_a_comment_where_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = cells(axes={"arm": SWEPT_ARMS}, seeds=2, set={"model.system_prompt": "it's a $HOME"})
    lines = list(command_lines(found))
    wait = next(place for place, line in enumerate(lines) if line.startswith("# wait"))
    assert [line for line in lines if line.startswith("#")] == [lines[wait]]
    by_out = {shlex.split(line)[-1]: shlex.split(line) for line in lines if not line.startswith("#")}
    for cell in found:
        words = by_out[str(cell.job.folder)]
        assert words[:3] == ["atesd", "train", "micro"]
        assert load_config(words[2], words[4:-2:2]) == cell.job.config
    assert {Path(shlex.split(line)[-1]).name for line in lines[wait + 1 :]} == {"replay-seed-0", "replay-seed-1"}


def test_finished_cells_are_counted_and_not_listed(tmp_path: Path):
    found = fake_cells(tmp_path, "a", "b")
    finish(found[0])
    first, second = command_lines(found)
    assert first == "# 1 of 2 cells are finished and not listed"
    assert second.endswith("b-seed-0")


# The runner, with workers that pretend


def fake_cells(out: Path, *points: str, needs: Mapping[str, str] | None = None) -> list[Cell]:
    """Cells of 8 updates; `needs` maps a point to the one whose folder it replays."""
    arms: dict[str, Any] = {}
    for point in points:
        needed = (needs or {}).get(point)
        arms[point] = (
            {"exposure.kind": "replay", "exposure.replay_run": {"cell": {"arm": needed}}}
            if needed
            else {"exposure.kind": "fixed"}
        )
    return cells(out, axes={"arm": arms}, set={"train.num_updates": 8})


def finish(cell: Cell, updates: int = 8) -> None:
    run = begin_run(cell.job.folder, cell.job.config)
    for update in range(updates):
        run.append("metrics", metric_row(update, 0.5, np.random.default_rng(0)))
    run.end_session("finished")


class Pretender:
    """A worker that ends at once: as `endings` says for a run's name, else by finishing it."""

    endings: ClassVar[dict[str, Ending]]
    given: ClassVar[list[str]]
    started = closed = 0

    def __init__(self, _: Mapping[str, str]) -> None:
        type(self).started += 1
        self._reading, self._writing = os.pipe()
        self._name = ""

    def give(self, run: Any) -> None:
        recipe, overrides, folder, _ = run
        self._name = Path(folder).name
        type(self).given.append(self._name)
        if self._name not in self.endings:
            begin_run(Path(folder), load_config(recipe, overrides)).end_session("finished")
        os.write(self._writing, b".")

    def ending(self) -> Ending:
        os.read(self._reading, 1)
        return self.endings.get(self._name, Ending(0, goes_on=True))

    def fileno(self) -> int:
        return self._reading

    def terminate(self) -> None: ...

    def close(self) -> None:
        type(self).closed += 1
        os.close(self._reading)
        os.close(self._writing)


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def begin(self, board: Any) -> None:
        self.events += [(entry.job.name, "was finished") for entry in board if entry.status == "finished"]

    def changed(self, entry: Entry) -> None:
        self.events.append((entry.job.name, entry.status))

    def tick(self) -> None: ...


@pytest.fixture
def pretender(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Pretender]]:
    class Fresh(Pretender):
        endings: ClassVar[dict[str, Ending]] = {}
        given: ClassVar[list[str]] = []

    monkeypatch.setattr(jobs, "Worker", Fresh)
    yield Fresh
    assert Fresh.started == Fresh.closed  # no process is left


def run(found: list[Cell], processes: int = 1) -> tuple[list[Entry], Notes]:
    notes = Notes()
    return run_all([cell.job for cell in found], slots(processes), notes), notes


def test_a_failed_cell_stops_only_those_that_need_it(tmp_path: Path, pretender: type[Pretender]):
    found = fake_cells(tmp_path, "a", "b", "c", "d", needs={"c": "a", "d": "c"})
    (tmp_path / "a-seed-0.log").write_text("$ atesd train\nerror: out of luck\n")
    pretender.endings = {"a-seed-0": Ending(1)}
    board, _ = run(found)
    assert {e.job.name[0]: e.status for e in board} == {"a": "failed", "b": "finished", "c": "blocked", "d": "blocked"}
    reasons = {entry.job.name[0]: entry.reason for entry in board}
    assert reasons["a"].endswith(
        f"ended with exit code 1; its log {tmp_path / 'a-seed-0.log'} ends with\n  error: out of luck"
    )
    assert "needs" in reasons["d"]
    assert pretender.given == ["a-seed-0", "b-seed-0"]


def test_running_again_trains_what_failed_and_nothing_else(tmp_path: Path, pretender: type[Pretender]):
    found = fake_cells(tmp_path, "a", "b", "c", needs={"c": "a"})
    pretender.endings = {"a-seed-0": Ending(-9)}
    board, _ = run(found)
    assert "was killed by signal 9" in board[0].reason
    pretender.endings, pretender.given = {}, []
    board, notes = run(found)
    assert [entry.status for entry in board] == ["finished"] * 3
    assert pretender.given == ["a-seed-0", "c-seed-0"]
    assert notes.events[0] == ("b-seed-0", "was finished")


@pytest.mark.usefixtures("pretender")
def test_a_needed_cell_is_finished_before_the_one_that_reads_it_begins(tmp_path: Path):
    _, notes = run(fake_cells(tmp_path, "a", "b", "c", needs={"a": "c"}), processes=3)
    assert notes.events.index(("c-seed-0", "finished")) < notes.events.index(("a-seed-0", "running"))


def test_one_worker_trains_many_and_is_replaced_only_after_a_failure(tmp_path: Path, pretender: type[Pretender]):
    pretender.endings = {"b-seed-0": Ending(1)}
    run(fake_cells(tmp_path, "a", "b", "c", "d"))
    assert pretender.given == [f"{name}-seed-0" for name in "abcd"]
    assert pretender.started == 2


def test_a_cell_that_another_process_trains_is_left_to_it_and_looked_at_again(
    tmp_path: Path, pretender: type[Pretender], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jobs, "HELD_SECONDS", 0.0)
    found = fake_cells(tmp_path, "a", "b")
    claim = found[0].job.claim()  # a lock object of its own, as another process has

    class Other(Notes):
        """Ends its run once b is finished."""

        def changed(self, entry: Entry) -> None:
            super().changed(entry)
            if (entry.job.name, entry.status) == ("b-seed-0", "finished"):
                finish(found[0])
                claim.__exit__(None, None, None)

    assert claim.__enter__()
    notes = Other()
    board = run_all([cell.job for cell in found], slots(1), notes)
    events = notes.events
    assert events == [("a-seed-0", "held"), ("b-seed-0", "running"), ("b-seed-0", "finished"), ("a-seed-0", "finished")]
    assert [entry.status for entry in board] == ["finished"] * 2
    assert pretender.given == ["b-seed-0"]


def test_a_run_folder_that_is_in_use_is_held_too(tmp_path: Path):
    job = fake_cells(tmp_path, "a")[0].job
    assert not job.is_held()
    folder = begin_run(job.folder, job.config)
    assert not job.is_held()
    with folder.lock():
        assert job.is_held()
    assert not job.is_held()


def test_a_disk_that_takes_no_owner_file_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = fake_cells(tmp_path, "a")[0].job
    begin_run(job.folder, job.config)
    (job.folder / ".owner.json").mkdir()  # as on a full disk, what names the owner cannot be written
    assert not job.is_in_use()
    monkeypatch.setattr(worker, "_run", lambda _: 1)
    assert worker._ending(job) == {"code": 1, "held": False, "goes_on": False}


@pytest.mark.parametrize("place", ["a-seed-0/.lock", ".claims/a-seed-0.lock"])
def test_a_cell_whose_lock_the_disk_refuses_fails_with_its_reason(
    place: str, tmp_path: Path, pretender: type[Pretender], monkeypatch: pytest.MonkeyPatch
):
    found = fake_cells(tmp_path, "a", "b")
    begin_run(found[0].job.folder, found[0].job.config)
    (tmp_path / place).unlink(missing_ok=True)
    (tmp_path / place).mkdir(parents=True)  # what is no file cannot be locked, whoever asks
    board, _ = run(found)
    assert [entry.status for entry in board] == ["failed", "finished"]
    assert re.search(rf"a-seed-0: .*{place}: cannot be locked: ", board[0].reason)
    assert pretender.given == ["b-seed-0"]
    monkeypatch.setattr(worker, "_run", lambda _: 1)
    if place.startswith("a-"):
        assert worker._ending(found[0].job)["held"] is False


def test_a_folder_with_other_settings_is_refused_before_anything_begins(tmp_path: Path, pretender: type[Pretender]):
    found = fake_cells(tmp_path, "a", "b")
    begin_run(found[1].job.folder, fake_config(8))
    with pytest.raises(RunError, match="b-seed-0: the config differs"):
        run(found)
    assert pretender.given == []


def test_a_run_that_was_evaluated_otherwise_is_refused_and_not_taken_for_finished(tmp_path: Path):
    cell = fake_cells(tmp_path, "a")[0]
    finish(cell)
    other = Job(cell.job.recipe, (*cell.job.overrides, "evaluation.samples=12"), cell.job.folder)
    with pytest.raises(RunError, match=r"evaluated with other settings:\n  evaluation.samples: 2 -> 12"):
        other.is_finished()


def test_a_finished_run_that_shall_be_longer_goes_on(tmp_path: Path):
    cell = fake_cells(tmp_path, "a")[0]
    finish(cell)
    assert cell.job.is_finished()
    longer = Job(cell.job.recipe, (*cell.job.overrides, "train.num_updates=9"), cell.job.folder)
    assert not longer.is_finished()


def test_two_jobs_in_one_folder_are_refused_even_if_only_case_tells_them_apart():
    with pytest.raises(ValueError, match="folders of two jobs"):
        run_all([Job("micro", (), Path("A")), Job("micro", (), Path("a"))], slots(1), Notes())


def test_a_second_interrupt_kills_what_the_first_asked_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    happened: list[str] = []

    class Slow(Pretender):
        endings: ClassVar[dict[str, Ending]] = {}
        given: ClassVar[list[str]] = []

        def terminate(self) -> None:
            happened.append("asked")

        def close(self) -> None:
            raise KeyboardInterrupt

        def kill(self) -> None:
            happened.append("killed")
            super().close()

    class Impatient(Notes):
        def changed(self, _: Entry) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "Worker", Slow)
    with pytest.raises(SystemExit) as end:
        run_all([cell.job for cell in fake_cells(tmp_path, "a")], slots(1), Impatient())
    assert end.value.code == 130
    assert happened == ["asked", "killed"]


def test_two_sweeps_may_write_the_files_of_one_folder_at_the_same_time(tmp_path: Path):
    texts = ["a" * 50_000, "b" * 50_000]

    def write(text: str) -> None:
        for _ in range(40):
            write_shared(tmp_path / "table.txt", text)

    with ThreadPoolExecutor(2) as both:
        list(both.map(write, texts))  # without a lock one finds its temporary file gone
    assert (tmp_path / "table.txt").read_text() in texts


def test_processes_are_one_thread_each_or_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch):
    assert slots(2) == [{"OMP_NUM_THREADS": "1"}] * 2
    assert len(slots()) == workers.cores()
    assert slots(3, ["0", "MIG-7"]) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "MIG-7", "0")]
    monkeypatch.setattr(workers.metadata, "version", lambda _: "2.9.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,")
    assert visible_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.setattr(workers.metadata, "version", lambda _: "2.9.0+cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_gpus() == []


# What it shows


def test_the_time_left_is_the_wall_time_per_update_times_the_updates_to_come(tmp_path: Path):
    found = fake_cells(tmp_path, "a", "b", "c")
    progress = SweepProgress(found, processes=2)
    board = [Entry(found[0].job, "waiting"), Entry(found[1].job, "waiting"), Entry(found[2].job, "waiting")]
    progress.begin(board)
    assert progress.seconds_left is None
    progress.began(board[0])
    board[0].status, board[0].seconds = "finished", 16.0  # 8 updates: 2 s each
    assert progress.seconds_left == pytest.approx(2.0 * 16 / 2)  # 16 updates to come, two at a time
    assert progress.figures() == ["1/3 cells", "2 waiting", "left 16.0 s"]


def test_a_running_cell_shows_its_update_ratio_and_accuracy(tmp_path: Path):
    cell = fake_cells(tmp_path, "a")[0]
    progress, entry = SweepProgress([cell], 1), Entry(cell.job, "running")
    progress.begin([entry])
    progress.began(entry)
    assert progress.cell_figures(entry) == ["a-seed-0: update 0/8"]
    begin_run(cell.job.folder, cell.job.config).append(
        "metrics", metric_row(2, 0.25, np.random.default_rng(0), accuracy=0.5)
    )
    progress.look()
    assert progress.cell_figures(entry) == ["a-seed-0: update 3/8", "ratio 0.25", "accuracy 50.0 %"]
    console = Console(file=io.StringIO(), width=60, color_system=None, force_terminal=True, legacy_windows=False)
    console.print(LiveSweep(progress, console))
    shown = console.file.getvalue()
    assert "a-seed-0: update 3/8" in shown
    assert max(map(len, shown.splitlines())) <= 60


def test_without_a_terminal_each_event_is_a_line_with_nothing_hidden(tmp_path: Path):
    cell = fake_cells(tmp_path, "a")[0]
    progress, file = SweepProgress([cell], 1), io.StringIO()
    view, entry = PlainSweep(progress, file), Entry(cell.job, "waiting")
    view.begin([entry])
    entry.status, entry.reason = "failed", "a-seed-0 ended with exit code 1: \x1b[2J"
    view.changed(entry)
    assert file.getvalue() == (
        "1 cells, 0 of them finished\n[0/1 cells, 1 failed, left –] a-seed-0 ended with exit code 1: ⟦U+001B⟧[2J\n"
    )


def test_before_a_cell_has_finished_the_pace_is_that_of_the_running_one_since_its_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = [100.0]
    monkeypatch.setattr("atesd_lab.cli.sweep.time.monotonic", lambda: clock[0])
    found = fake_cells(tmp_path, "a", "b")
    board = [Entry(cell.job, "waiting") for cell in found]
    progress = SweepProgress(found, processes=1)
    progress.begin(board)
    board[0].status, board[0].began = "running", clock[0]
    progress.began(board[0])
    run = begin_run(found[0].job.folder, found[0].job.config)
    for now, update in ((130.0, 0), (140.0, 1)):  # half a minute of preparation, then 10 s for an update
        clock[0] = now
        run.append("metrics", metric_row(update, 0.5, np.random.default_rng(0)))
        progress.look()
    assert progress.seconds_left == pytest.approx(10.0 * (6 + 8))


def test_updates_that_an_earlier_sweep_made_are_not_to_come(tmp_path: Path):
    found = fake_cells(tmp_path, "a", "b")
    run = begin_run(found[1].job.folder, found[1].job.config)
    for update in range(6):
        run.append("metrics", metric_row(update, 0.5, np.random.default_rng(0)))
    board = [Entry(cell.job, "waiting") for cell in found]
    progress = SweepProgress(found, processes=1)
    progress.begin(board)
    progress.began(board[0])
    board[0].status, board[0].seconds = "finished", 8.0  # 8 updates: 1 s each
    assert progress.seconds_left == pytest.approx(2.0)  # two of eight


def test_scores_are_the_last_the_best_and_the_late_ratio(tmp_path: Path):
    run = write_fake_run(tmp_path / "run", updates=60, kind="full")
    found = scores(run.path)
    validation = {
        row["update"]: row["average"]["value"] for row in run.rows("evaluations") if row["split"] == "validation"
    }
    assert found["validation"] == validation[60]
    assert found["best"] == max(validation.values())
    assert validation[found["best_update"]] == found["best"]
    assert found["late_ratio"] == 1.0


def test_the_newest_row_is_read_from_the_end_whatever_its_length(tmp_path: Path):
    run = begin_run(tmp_path / "run", fake_config(8))
    assert run.last_row("metrics") is None
    for update, size in enumerate((1, 10_000, 5, 100_000)):
        run.append("metrics", {"update": update, "text": "x" * size})
        assert run.last_row("metrics") == run.rows("metrics")[-1]
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"update": 4, "te')
    assert run.last_row("metrics") == run.rows("metrics")[-1]
    (tmp_path / "run" / "samples.jsonl").write_bytes(b'{"upd')
    assert run.last_row("samples") is None


def test_what_all_cells_share_is_left_out_where_nothing_reads_it():
    full, sound, _ = cells(axes={"arm": SWEPT_ARMS}, set={"credit.hold_updates": 2})
    assert [word for word in full.job.overrides if "credit" in word] == []
    assert sound.job.config.credit.hold_updates == 2


def test_what_all_cells_share_must_act_in_one_of_them():
    with pytest.raises(ConfigError, match=r"cell \(every cell\): .*credit.hold_updates: 2 has no effect here"):
        cells(axes={"arm": {"full": {"exposure.kind": "full"}}}, set={"credit.hold_updates": 2})


def test_a_setting_of_a_point_must_act_in_every_cell_unless_the_plan_says_which_do_without():
    axes = {
        "world": {"plain": {}, "ema": {"teacher.weights": "ema", "teacher.decay": 0.5}},
        "arm": {"full": {"exposure.kind": "full"}, "grpo": {"train.method": "grpo"}},
    }
    with pytest.raises(ConfigError, match=r"teacher.weights: 'ema' has no effect here; it acts with train.method"):
        cells(axes=axes)
    without = [{"world": "ema", "arm": "grpo", "settings": ["teacher.weights", "teacher.decay"]}]
    found = {cell.group: cell.job.config for cell in cells(axes=axes, without=without)}
    assert found["ema-grpo"] == found["plain-grpo"]
    assert found["ema-full"].teacher.weights == "ema"


def test_without_names_settings_of_the_plan():
    with pytest.raises(ConfigError, match=r"without\[0\]: settings: 'teacher.wieghts' is set nowhere in the plan"):
        cells(axes={"arm": SWEPT_ARMS}, without=[{"arm": "full", "settings": "teacher.wieghts"}])
