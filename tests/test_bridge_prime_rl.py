"""The bridge for prime-rl against a checkout of it: its algorithm, sink, cohorts, monitors and checkpoints for real.

prime-rl is not released as a package: ATESD_PRIME_RL names the folder of a checkout (make test-prime-rl). What stands
in for a GPU are the rollouts, the scores of the inference server, and the orchestrator's own loop, whose order of calls
is read.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import os
import string
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atesd.bridges.core import Feedback, Handle
from atesd.errors import DataError, TrainingError
from atesd.models.load import save_model
from atesd.runs import RunFolder
from tiny import tiny_model

CHECKOUT = os.environ.get("ATESD_PRIME_RL")
if CHECKOUT is None:
    pytest.skip("ATESD_PRIME_RL names no checkout of prime-rl; make test-prime-rl", allow_module_level=True)
ROOT = Path(CHECKOUT).absolute()
if not (ROOT / "src/prime_rl/orchestrator").is_dir():
    pytest.fail(
        f"ATESD_PRIME_RL: {ROOT} is no checkout of prime-rl: it has no src/prime_rl/orchestrator", pytrace=False
    )
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "packages/prime-rl-configs/src")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import verifiers.v1 as vf
    from prime_rl import monitors
    from prime_rl.configs.algorithm import OPSDAlgoConfig
    from prime_rl.configs.orchestrator import CheckpointConfig
    from prime_rl.orchestrator import algo, ckpt, train_sink
    from prime_rl.orchestrator.types import Progress
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.types import AssistantMessage, UserMessage

    from atesd.bridges import prime_rl as bridge

pytestmark = [pytest.mark.bridges, pytest.mark.filterwarnings("ignore")]

UPDATES = 6
REFERENCE = "First 2 + 3 = 5.\nThen 5 + 4 = 9.\nSo \\boxed{9}."
CUT = "First 2 + 3 = 5.\n[The reference may be incomplete from here on.]\nFinal answer: \\boxed{9}"
FULL, HALF = ({"exposure": {"kind": "fixed", "reveal_ratio": ratio}} for ratio in (1.0, 0.5))
CREDIT = {"progress_signal": "train_success", "hold_updates": 1, "lookahead_updates": 1}
BANDIT = {"exposure": {"kind": "bandit"}, "credit": CREDIT}
GROUP = 2


class Task(vf.TaskData):
    demonstration: Any = None


class Pool:
    """Stands for the inference servers: a teacher that scores a token at minus a thousandth of the whole length."""

    def __init__(self, model: Path) -> None:
        self.model_name, self.scored = str(model), list[list[int]]()

    async def score(self, token_ids: list[int]) -> list[float]:
        self.scored.append(list(token_ids))
        return [-len(token_ids) / 1000] * len(token_ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prime") / "model"
    save_model(tiny_model(list(string.printable)), folder)
    return folder


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(algo.ALGORITHM_CLASSES, "opsd", algo.OPSDAlgorithm)
    monkeypatch.setattr(ckpt, "CheckpointManager", bridge.CheckpointManager)
    monkeypatch.setattr(monitors, "MONITORS", [])
    yield
    if bridge.Exposed.active is not None:
        bridge.Exposed.active.close()


def episode(group: str, reward: float, demonstration: Any = REFERENCE, step: int = 1) -> Any:
    """A rollout of five tokens, two of them sampled, as an env server sends it."""
    nodes = [
        MessageNode(message=UserMessage(content="2 + 3 + 4?"), token_ids=[5, 6, 7], mask=[False] * 3),
        MessageNode(
            parent=0,
            message=AssistantMessage(content="9"),
            sampled=True,
            token_ids=[8, 9],
            mask=[True, True],
            logprobs=[-0.5, -0.5],
        ),
    ]
    task = vf.TraceTask(type="Task", data=Task(idx=0, prompt=None, demonstration=demonstration))
    rewards = {"solved": vf.Reward(score=reward)}
    trace = vf.Trace(task=task, agent=vf.AgentInfo(config=vf.AgentConfig()), nodes=nodes, rewards=rewards, ok=True)
    env = vf.EnvInfo(id="sums", name="sums")
    made = vf.Episode(env=env, task=task, group=vf.GroupInfo(id=group), traces=[trace])
    made.record_run(vf.TrainRunInfo(id="run", work=vf.TrainWorkInfo(step=step)))
    return made


class Loop:
    """prime-rl's sink, monitors and checkpoints, called in the order of `Orchestrator.finalize_train_batch`."""

    def __init__(self, model: Path, folder: Path, resumed: int = 0) -> None:
        self.pool, self.progress = Pool(model), Progress()
        config = OPSDAlgoConfig(renderer={"name": "default"})
        self.algorithm = algo.build_algorithm(config, self.pool)
        env = SimpleNamespace(
            algorithm=self.algorithm, config=SimpleNamespace(group_size=GROUP), sampling_args={"temperature": 1.0}
        )
        settings = SimpleNamespace(
            max_off_policy_steps=8, seq_len=64, train=SimpleNamespace(filter_zero_advantages=True)
        )
        self.sink = train_sink.TrainSink(
            settings,
            tokenizer=None,
            train_envs=SimpleNamespace(get=lambda _: env),
            mm_token_type_ids_mapping=None,
            progress=self.progress,
            batch_size=GROUP,
            token_batch_size=None,
        )
        self.checkpoints = ckpt.setup_ckpt_manager(folder, CheckpointConfig())
        self.source = SimpleNamespace(state_dict=lambda: {"envs": {}}, load_state_dict=lambda _: None, curricula={})
        asyncio.run(self.algorithm.setup())
        if resumed:
            self.checkpoints.load(self.progress, self.source, resumed)
            self.progress.step = resumed + 1

    async def step(self, demonstration: Any = REFERENCE) -> Any:
        batch, step = None, self.progress.step
        for number in range(GROUP):
            batch = await self.sink.add(episode(f"group {step}", float((step + number) % 3 == 0), demonstration))
        assert batch is not None
        await monitors.log(batch.cohort.effective.vf_episodes, step, "train", "effective")
        self.progress.step += 1
        self.checkpoints.save(self.progress, self.source, step)
        await monitors.log({"step": step}, step=step)
        return batch

    def play(self, last: int) -> list[Any]:
        async def steps() -> list[Any]:
            return [await self.step() for _ in range(self.progress.step, last + 1)]

        return asyncio.run(steps())


# What the bridge touches. These fail when prime-rl moves it.


def source_of(name: str) -> str:
    return (ROOT / f"src/prime_rl/{name}.py").read_text("utf-8")


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_methods_that_the_bridge_overrides_are_as_they_were() -> None:
    assert parameters(algo.OPSDAlgorithm._demonstration) == ["self", "episode", "trace"]
    assert inspect.iscoroutinefunction(algo.OPSDAlgorithm.setup)
    call = inspect.getsource(algo.OPSDAlgorithm.score_episode)
    assert "self._demonstration(episode, trace)" in call
    assert call.index("self._demonstration") < call.index("await")  # so one rollout's view is made in one go
    assert "ALGORITHM_CLASSES[config.type]" in inspect.getsource(algo.build_algorithm)
    manager = bridge.CheckpointManager
    assert parameters(manager.save) == ["self", "progress", "train_source", "step"]
    assert parameters(manager.load) == ["self", "progress", "train_source", "step", "path"]
    assert parameters(manager.get_ckpt_path) == ["self", "step"]
    assert "return CheckpointManager(" in inspect.getsource(ckpt.setup_ckpt_manager)


def test_a_monitor_is_heard_as_the_bridge_listens() -> None:
    assert parameters(monitors.log) == ["data", "step", "kind", "subset"]
    assert "monitor.log(data, step=step, kind=kind, subset=subset)" in inspect.getsource(monitors.log)
    assert "await monitor.finalize()" in inspect.getsource(monitors.finalize)
    methods = {"log", "finalize"}
    assert methods <= set(vars(bridge.Exposed))
    assert methods <= set(vars(importlib.import_module("prime_rl.monitors.base").Monitor))


def test_the_orchestrator_calls_in_the_order_that_the_bridge_relies_on() -> None:
    source = source_of("orchestrator/orchestrator")
    setup = source[source.index("async def setup(") : source.index("async def start(")]
    places = [
        "await monitors.setup(",
        "self.train_envs = TrainEnvs(",
        "env.algorithm.setup()",
        "self.ckpt_manager.load(self.progress, self.train_source, step=self.resume_step, path=resume_path)",
        "self.progress.step = self.resume_step + 1",
        "self.dispatcher = Dispatcher(",
    ]
    assert [setup.index(place) for place in places] == sorted(setup.index(place) for place in places)
    ship = source[source.index("async def finalize_train_batch(") : source.index("async def start_draining(")]
    places = [
        "step = self.progress.step",
        'monitors.log(effective.vf_episodes, step, "train", "effective")',
        "self.progress.step += 1",
        "self.maybe_save_ckpt(step)",
    ]
    assert [ship.index(place) for place in places] == sorted(ship.index(place) for place in places)
    assert ship.count("effective.vf_episodes") == 1
    assert "self.ckpt_manager.save(self.progress, self.train_source, step)" in source
    assert "self.ckpt_manager = setup_ckpt_manager(" in source
    assert "build_algorithm(config.algo, policy_pool)" in source_of("orchestrator/envs")


def test_the_two_lines_of_the_proposal_load_a_plugin(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs/bridges.md").read_text("utf-8")
    lines = [line for line in page.splitlines() if "PRIME_RL_PLUGINS" in line or "__import__(plugin)" in line]
    lines = [line[1:] for line in lines if line.startswith("+")]
    assert len(lines) == 2
    source = source_of("orchestrator/orchestrator")
    place = "        setup_logger(config.log.level, json_logging=config.log.json_logging)\n"
    assert source.count(place) == 1
    patched = ast.parse(source.replace(place, place + "\n".join(lines) + "\n"))
    made = next(node for node in ast.walk(patched) if isinstance(node, ast.ClassDef) and node.name == "Orchestrator")
    first = next(node for node in made.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    loop = next(node for node in first.body if isinstance(node, ast.For))
    (tmp_path / "my_exposure.py").write_text(
        f"from atesd.bridges.prime_rl import expose\nexpose({HALF}, {str(tmp_path / 'run')!r}, {UPDATES})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PRIME_RL_PLUGINS", "my_exposure")
    exec(compile(ast.Module([loop], []), "patched", "exec"), {"os": os})
    monkeypatch.delitem(sys.modules, "my_exposure")
    assert isinstance(Loop(model, tmp_path).algorithm, bridge.ExposedOPSD)


# What its objects do, driven by prime-rl's own code.


def hint_ids(loop: Loop, demonstration: str) -> list[int]:
    hint = loop.algorithm.template.format(demonstration=demonstration)
    ids = loop.algorithm.renderer.render_ids([{"role": "system", "content": hint}], add_generation_prompt=False)
    return list(ids)


def test_full_exposure_scores_the_very_ids_of_prime_rl_without_the_bridge(model: Path, tmp_path: Path) -> None:
    plain = Loop(model, tmp_path / "plain")
    without = plain.play(UPDATES)
    bridge.expose(FULL, tmp_path / "run", UPDATES)
    ours = Loop(model, tmp_path / "ours")
    batches = ours.play(UPDATES)
    assert ours.pool.scored == plain.pool.scored
    for one, other in zip(batches, without, strict=True):
        assert one.samples == other.samples


def test_the_teachers_ids_are_those_of_the_view_in_front_of_the_rollout(model: Path, tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run", UPDATES)
    loop = Loop(model, tmp_path)
    batches = loop.play(UPDATES)
    expected = [*hint_ids(loop, CUT), 5, 6, 7, 8, 9]
    assert loop.pool.scored == [expected] * GROUP * UPDATES
    assert batches[0].samples[0].ref_kl_weights == [0.0, 0.0, 0.0, 1.0, 1.0]
    run = RunFolder.open(tmp_path / "run")
    rows = run.whole_rows("metrics")
    assert [row["update"] for row in rows] == list(range(UPDATES))
    assert [row["loss"] for row in rows] == pytest.approx([-0.5 + len(expected) / 1000] * UPDATES)
    solved = [sum((step + number) % 3 == 0 for number in range(GROUP)) / GROUP for step in range(1, UPDATES + 1)]
    assert [row["accuracy"] for row in rows] == solved
    assert run.config.model.path == str(model)


def test_a_resumed_run_continues_the_controller(model: Path, tmp_path: Path) -> None:
    exposed = bridge.expose(BANDIT, tmp_path / "run", UPDATES)
    Loop(model, tmp_path).play(5)
    exposed.close()
    again = bridge.expose(BANDIT, tmp_path / "run", UPDATES)
    Loop(model, tmp_path, resumed=3).play(UPDATES)
    asyncio.run(monitors.finalize())
    unbroken, run = Handle(again.handle.config), RunFolder.open(tmp_path / "run")
    rows = run.rows("metrics")
    assert [row["update"] for row in rows] == list(range(UPDATES))
    for row in rows:
        assert row["reveal_ratio"] == unbroken.ratio(row["update"])
        assert row["accuracy"] is not None
        unbroken.grade(row["update"], [("", 0, right) for right in (row["accuracy"] * GROUP, 0.0)])
        unbroken.observe(row["update"], Feedback(row["loss"]))
    assert (run.manifest["status"], len(run.manifest["sessions"])) == ("finished", 2)


def test_a_task_without_a_demonstration_stops_the_run_in_prime_rls_words(model: Path, tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run", UPDATES)
    with pytest.raises(ValueError, match="opsd requires 'demonstration'"):
        asyncio.run(Loop(model, tmp_path).step(demonstration=None))


def test_a_demonstration_without_an_answer_stops_the_run(model: Path, tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run", UPDATES)
    with pytest.raises(DataError, match="no answer is stated"):
        asyncio.run(Loop(model, tmp_path).step(demonstration="no box"))


def test_an_error_that_prime_rl_only_logs_stops_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exposed = bridge.expose(HALF, tmp_path / "run", UPDATES)
    loop = Loop(model, tmp_path)
    monkeypatch.setattr(exposed.handle, "observe", lambda *_: 1 / 0)
    with pytest.raises(TrainingError, match="step 1: ZeroDivisionError"):
        loop.play(2)
