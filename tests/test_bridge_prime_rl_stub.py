"""The bridge for prime-rl on a stand-in of its four modules: what is shown, told, kept and refused."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from atesd.bridges.core import Feedback, Handle
from atesd.errors import ConfigError, DataError, RunError, TrainingError
from atesd.runs import RunFolder

UPDATES = 6
REFERENCE = "First 2 + 3 = 5.\nThen 5 + 4 = 9.\nSo \\boxed{9}."
CUT = "First 2 + 3 = 5.\n[The reference may be incomplete from here on.]\nFinal answer: \\boxed{9}"
HALF = {"exposure": {"kind": "fixed", "reveal_ratio": 0.5}}
CREDIT = {"progress_signal": "train_success", "hold_updates": 1, "lookahead_updates": 1}
BANDIT = {"exposure": {"kind": "bandit"}, "credit": CREDIT}


class Algorithm:
    """As prime-rl's OPSDAlgorithm: it scores every rollout of an episode with its demonstration."""

    def __init__(self) -> None:
        self.hints: list[str] = []
        self.policy_pool = SimpleNamespace(model_name="some-model")

    async def setup(self) -> None: ...

    def _demonstration(self, _: Any, trace: Any) -> Any:
        return trace.demonstration

    async def score_episode(self, episode: Any) -> None:
        for trace in episode.traces:
            self.hints.append(self._demonstration(episode, trace))
            trace.nodes[-1].reference_logprobs = [-1.0, -2.0]


class Checkpoints:
    """As prime-rl's CheckpointManager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get_ckpt_path(self, step: int) -> Path:
        return self._folder / f"step_{step}/orchestrator"

    def save(self, progress: Any, train_source: Any, step: int) -> None: ...

    def load(self, progress: Any, train_source: Any, step: int, path: Path | None = None) -> None: ...


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bridge, imported with the stand-ins in prime-rl's place."""
    modules = {
        "prime_rl": {},
        "prime_rl.monitors": {"MONITORS": []},
        "prime_rl.orchestrator": {},
        "prime_rl.orchestrator.algo": {"ALGORITHM_CLASSES": {"opsd": Algorithm}, "OPSDAlgorithm": Algorithm},
        "prime_rl.orchestrator.ckpt": {"CheckpointManager": Checkpoints},
    }
    for name, values in modules.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.delitem(sys.modules, "atesd.bridges.prime_rl", raising=False)
    imported = importlib.import_module("atesd.bridges.prime_rl")
    yield imported
    if imported.Exposed.active is not None:
        imported.Exposed.active.close()
    del sys.modules["atesd.bridges.prime_rl"]


def trace(reward: float = 1.0, demonstration: Any = REFERENCE) -> Any:
    asked = SimpleNamespace(message=SimpleNamespace(role="user", content="2 + 3 + 4?"), reference_logprobs=None)
    said = SimpleNamespace(
        message=SimpleNamespace(role="assistant", content="9"), logprobs=[-0.5, -0.5], reference_logprobs=None
    )
    return SimpleNamespace(info={}, nodes=[asked, said], reward=reward, demonstration=demonstration)


class Loop:
    """The orchestrator's order of calls: rollouts are scored, a batch is logged as effective, then saved."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from prime_rl import monitors
        from prime_rl.orchestrator import algo, ckpt

        self.monitors, self.step = monitors, step
        self.algorithm: Any = algo.ALGORITHM_CLASSES["opsd"]()
        self.checkpoints = ckpt.CheckpointManager(folder)
        asyncio.run(self.algorithm.setup())
        if step:
            self.checkpoints.load(None, None, step)

    def scored(self, *traces: Any) -> list[Any]:
        asyncio.run(self.algorithm.score_episode(SimpleNamespace(traces=list(traces))))
        return list(traces)

    def ship(self, traces: list[Any]) -> None:
        self.step += 1
        for monitor in self.monitors.MONITORS:
            asyncio.run(monitor.log([SimpleNamespace(traces=traces)], self.step, "train", "effective"))
            asyncio.run(monitor.log({"step": self.step}, self.step))
        self.checkpoints.save(None, None, self.step)

    def play(self, last: int) -> None:
        while self.step < last:
            self.ship(self.scored(trace(float(self.step % 2)), trace(0.0)))


def test_the_teacher_reads_the_view_and_the_step_is_told_what_shipped(bridge: Any, tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run", UPDATES)
    loop = Loop(tmp_path)
    loop.play(UPDATES)
    asyncio.run(loop.monitors.MONITORS[0].finalize())
    assert loop.algorithm.hints == [CUT] * 2 * UPDATES
    run = RunFolder.open(tmp_path / "run")
    rows = run.whole_rows("metrics")
    assert [row["update"] for row in rows] == list(range(UPDATES))
    assert [row["accuracy"] for row in rows] == [0.0, 0.5] * (UPDATES // 2)
    assert {row["loss"] for row in rows} == {1.0}  # the student at -.5 twice, the teacher at -1 and -2
    assert {(row["kl"], row["reveal_ratio"], row["effective_ratio"]) for row in rows} == {(None, 0.5, 0.5)}
    assert (run.manifest["status"], run.manifest["trainer"]) == ("finished", "prime-rl")


def test_a_segmenter_of_the_users_own_cuts_the_references(bridge: Any, tmp_path: Path) -> None:
    bridge.expose({**HALF, "data": {"segmenter": "own_functions:kept"}}, tmp_path / "run", UPDATES)
    loop = Loop(tmp_path)
    loop.play(1)
    assert loop.algorithm.hints == [CUT] * 2  # by lines, as ours cuts this one


def test_a_rollout_that_ships_late_counts_where_it_ships_at_the_ratio_it_was_scored_at(
    bridge: Any, tmp_path: Path
) -> None:
    schedule = {"exposure": {"kind": "schedule", "schedule_start": 1.0, "schedule_end": 0.0}}
    exposed = bridge.expose(schedule, tmp_path / "run", UPDATES)
    loop = Loop(tmp_path)
    early, late = loop.scored(trace(), trace())
    loop.ship([early])
    loop.ship([late])
    loop.ship(loop.scored(trace()))
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert [row["reveal_ratio"] for row in rows] == [exposed.handle.exposure.reveal_ratio(u) for u in (0, 0, 2)]
    assert rows[0]["reveal_ratio"] != rows[2]["reveal_ratio"]


def test_a_resumed_run_continues_the_controller(bridge: Any, tmp_path: Path) -> None:
    exposed = bridge.expose(BANDIT, tmp_path / "run", UPDATES)
    cut = Loop(tmp_path)
    cut.play(4)
    cut.scored(trace())  # in flight when it is killed
    exposed.close()
    bridge.expose(BANDIT, tmp_path / "run", UPDATES)
    Loop(tmp_path, step=3).play(UPDATES)
    unbroken, rows = Handle(exposed.handle.config), RunFolder.open(tmp_path / "run").rows("metrics")
    assert [row["update"] for row in rows] == list(range(UPDATES))
    for row in rows:
        assert row["reveal_ratio"] == unbroken.ratio(row["update"])
        verdicts = [("", 0, float(row["accuracy"] == 0.5)), ("", 0, 0.0)]
        unbroken.grade(row["update"], verdicts)
        unbroken.observe(row["update"], Feedback(row["loss"]))


def test_a_step_without_our_rollouts_is_lost_and_the_next_is_told(bridge: Any, tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run", UPDATES)
    loop = Loop(tmp_path)
    loop.play(1)
    loop.ship([trace()])  # of another environment: never scored by us
    loop.play(3)
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert [row["skipped"] for row in rows] == [None, "its feedback never came", None]


def test_what_a_monitor_may_not_raise_stops_the_run_at_the_next_rollout(bridge: Any, tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run", UPDATES)
    loop = Loop(tmp_path)
    shipped = loop.scored(trace())
    shipped[0].nodes[-1].reference_logprobs = [-1.0]
    with pytest.raises(ValueError, match="shorter"):  # prime-rl logs this as a warning and goes on
        loop.ship(shipped)
    with pytest.raises(TrainingError, match=r"step 1: ValueError.*learns no more"):
        loop.scored(trace())
    with pytest.raises(TrainingError, match="step 1"):
        loop.checkpoints.save(None, None, 1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exposure": {"kind": "bandti"}}, "bandit"),
        ({"exposure": {"kind": "learned"}}, "probe_success is not measured in prime-rl"),
        ({"train": {"learning_rate": 1.0}}, "All else is prime-rl's"),
    ],
)
def test_what_will_not_do_is_refused_at_once(bridge: Any, settings: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        bridge.expose(settings, tmp_path / "run", UPDATES)


def test_a_second_exposure_and_a_run_longer_than_said_are_refused(bridge: Any, tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run", 1)
    with pytest.raises(ConfigError, match="called before"):
        bridge.expose(HALF, tmp_path / "other", 1)
    loop = Loop(tmp_path)
    loop.play(1)
    with pytest.raises(TrainingError, match="updates: 1: step 2 begins"):
        loop.scored(trace())


@pytest.mark.parametrize(("demonstration", "says"), [("no box", "no answer is stated"), (7, "the reference is 7")])
def test_a_demonstration_that_cannot_be_used_is_named(
    bridge: Any, demonstration: Any, says: str, tmp_path: Path
) -> None:
    bridge.expose(HALF, tmp_path / "run", UPDATES)
    with pytest.raises(DataError, match=says):
        Loop(tmp_path).scored(trace(demonstration=demonstration))


def test_a_folder_that_holds_a_run_is_refused_when_the_first_rollout_comes(bridge: Any, tmp_path: Path) -> None:
    exposed = bridge.expose(HALF, tmp_path / "run", UPDATES)
    Loop(tmp_path).play(1)
    exposed.close()
    bridge.expose(HALF, tmp_path / "run", UPDATES)
    with pytest.raises(RunError, match="already holds a run"):
        Loop(tmp_path).play(1)
