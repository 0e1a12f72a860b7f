"""The bridges for verl, tinker-cookbook and ms-swift on stand-ins of what they import: what is refused, and when."""

from __future__ import annotations

import importlib
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from atesd.bridges.owner import Owner
from atesd.config import dump_config
from atesd.errors import ConfigError
from atesd.runs import RunFolder

TRAINERS, VERSION = ("verl", "tinker-cookbook", "ms-swift"), metadata.version
CREDIT = {"progress_signal": "probe_success", "hold_updates": 2, "lookahead_updates": 2}
PROBED = {"exposure": {"kind": "bandit"}, "credit": CREDIT}
VERDICTS = {"exposure": {"kind": "success_setpoint"}}


def imported(monkeypatch: pytest.MonkeyPatch, name: str, modules: dict[str, dict[str, Any]]) -> Any:
    """The bridge of a name, with modules of these values in place of its trainer's."""
    for path, values in modules.items():
        module = ModuleType(path)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(metadata, "version", lambda package: "0" if package in TRAINERS else VERSION(package))
    monkeypatch.delitem(sys.modules, f"atesd.bridges.{name}", raising=False)
    bridge = importlib.import_module(f"atesd.bridges.{name}")
    monkeypatch.delitem(sys.modules, f"atesd.bridges.{name}")
    return bridge


# A metric that is named, and never logged.


class Trainer:
    """As verl's: what a step logged is only looked at."""

    def _compute_metrics(self, *_: Any, **__: Any) -> None: ...


class Worker:
    """As verl's agent-loop worker, in the wrapping of ray."""

    __ray_metadata__ = SimpleNamespace(modified_class=SimpleNamespace(__ray_actor_class__=object))


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Any:
    return imported(
        monkeypatch,
        "verl",
        {
            "ray": {"get": lambda given: given},
            "verl": {},
            "verl.trainer": {},
            "verl.trainer.ppo": {},
            "verl.trainer.ppo.v1": {"AgentLoopManagerTQ": object, "register_trainer": lambda _: lambda kind: kind},
            "verl.trainer.ppo.v1.agent_loop_tq": {"AgentLoopWorkerTQ": Worker},
            "verl.trainer.ppo.v1.trainer_sync": {"PPOTrainerSync": Trainer},
        },
    )


class Actor:
    """Stands for ray's handle on the owner."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._owner, name))


def steps(bridge: Any, owner: Owner, metrics: dict[str, str], logged: list[dict[str, float]], first: int = 0) -> None:
    """The driver's side of steps that log this, and with `val/` what was validated before them."""
    trainer = object.__new__(bridge.ExposedTrainer)
    trainer._own, trainer._exposure = {"metrics": metrics}, Actor(owner)
    for update, values in enumerate(logged, start=first):
        trainer._before = {name: value for name, value in values.items() if name.startswith("val/")}
        trainer._compute_metrics(None, values, {}, global_steps=update + 1, epoch=0)


def owner_of(out: Path, settings: Any, *measurable: str, updates_done: int = 0) -> Owner:
    facts = {"model": {"path": "some-model"}, "train": {"num_updates": 6}}
    bridge_config = importlib.import_module("atesd.bridges.settings").bridge_config
    config = bridge_config(settings, facts, trainer="verl", measurable=frozenset(measurable))
    return Owner(dump_config(config), str(out / "run"), "verl", updates_done, str(out / "saved"))


@pytest.mark.parametrize(
    ("settings", "name", "key"),
    [(PROBED, "probe_success", "val/accuracy"), (VERDICTS, "train_success", "critic/score/men")],
)
def test_verl_stops_at_the_first_update_whose_metric_was_not_logged(
    verl: Any, tmp_path: Path, settings: Any, name: str, key: str
):
    logged = {"val/acc": 0.5, "critic/score/mean": 0.25, "actor/lr": 1e-5}
    owner = owner_of(tmp_path, settings, name)
    near = {"probe_success": "val/acc", "train_success": "critic/score/mean"}[name]
    with pytest.raises(
        ConfigError, match=rf"metrics: {name}: {key} was not logged when it was due; nearest was {near}"
    ):
        steps(verl, owner, {name: key}, [logged])
    owner.end(False)


def test_a_metric_that_was_logged_once_may_be_missing_and_so_may_one_that_is_not_due(verl: Any, tmp_path: Path):
    # A probe is due at the updates 0, 2 and 4; at 2 nothing was validated.
    owner = owner_of(tmp_path, PROBED, "probe_success")
    steps(verl, owner, {"probe_success": "val/acc"}, [{"val/acc": 0.5}, {}, {}, {}])
    steps(verl, owner, {"probe_success": "val/acc", "probe_nll": "val/nll"}, [{}], first=4)
    owner.end(False)


def test_a_run_that_goes_on_may_begin_with_a_step_that_logged_nothing(verl: Any, tmp_path: Path):
    owner = owner_of(tmp_path, PROBED, "probe_success")
    steps(verl, owner, {"probe_success": "val/acc"}, [{"val/acc": 0.5}, {}])
    owner.told(2, 0.5, 0.0, {}, str(tmp_path / "saved"))
    owner.end(False)
    again = owner_of(tmp_path, PROBED, "probe_success", updates_done=3)
    steps(verl, again, {"probe_success": "val/acc"}, [{}, {}], first=3)  # 4 is due
    again.end(False)


def test_tinker_stops_at_the_first_update_whose_metric_was_not_logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    bridge = imported(monkeypatch, "tinker", {})
    cfg = SimpleNamespace(
        reverse=True, topk=0, max_steps=None, model_name="some-model", max_context_length=512, temperature=1.0,
        max_tokens=64, learning_rate=1e-5, eval_every=1, save_every=1, log_path=str(tmp_path / "log"),
    )  # fmt: skip
    exposed = bridge.expose(range(6), cfg, PROBED, tmp_path / "run", {"probe_success": "test/corect"})
    exposed._begin(0)
    with pytest.raises(ConfigError, match=r"probe_success: test/corect was not logged .* nearest was test/correct"):
        exposed.told({"test/correct": 0.5, "optim/lr": 1e-5}, 0)
    exposed._metrics["probe_success"] = "test/correct"
    exposed.told({"test/correct": 0.5, "optim/lr": 1e-5}, 0)
    exposed.told({"optim/lr": 1e-5}, 1)
    exposed._log.close()


# One exposure on several processes.

REFERENCE = "First 2 + 3 = 5.\nThen 5 + 4 = 9.\nSo \\boxed{9}."


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> Any:
    modules = {
        "swift": {},
        "swift.callbacks": {"callbacks_map": {}},
        "swift.rl_core": {},
        "swift.rl_core.data": {"OnPolicySample": SimpleNamespace(build_teacher_view=lambda _: True)},
    }
    return imported(monkeypatch, "swift", modules)


def callback(bridge: Any, settings: Any, out: Path, template: str = "{prompt}\n\n{reference}", **measure: Any) -> Any:
    """The callback as ms-swift makes it, of a trainer on two processes, about to train."""
    bridge.expose(settings, out / "run", template, measure)
    args = SimpleNamespace(
        logging_steps=1, gradient_accumulation_steps=1, save_strategy="no", per_device_train_batch_size=1, world_size=2,
        seed=0, learning_rate=1e-5, process_index=0, resume_from_checkpoint=None,
    )  # fmt: skip
    state = SimpleNamespace(global_step=0, max_steps=6)
    trainer = SimpleNamespace(state=state, model=SimpleNamespace(training=True))
    made = sys.modules["swift.callbacks"].callbacks_map["atesd"](args, trainer)
    made.on_train_begin(args, state)
    return made


def test_what_ms_swift_measures_and_shows_is_that_of_all_processes(
    swift: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    # The other process measures 1.0, and shows views of effective ratio 1.
    def gathered(own: list[Any]) -> list[Any]:
        return [*own, {"probe_success": 1.0}] if isinstance(own[0], dict) else [*own, *((r, 1.0) for r, _ in own)]

    monkeypatch.setattr(swift, "gather_object", gathered)
    exposed = callback(swift, PROBED, tmp_path, probe_success=lambda: 0.0)
    args, state = SimpleNamespace(), exposed._trainer.state
    exposed.on_step_begin(args, state)
    sample = SimpleNamespace(messages=[{"role": "user", "content": "2 + 3 + 4?"}], teacher_prompt=REFERENCE)
    exposed.view(sample)
    own = exposed._shown[0][1]
    state.global_step = 1
    exposed.on_log(args, state, logs={"loss": 0.5, "learning_rate": 1e-5})
    row = RunFolder.open(tmp_path / "run").rows("metrics")[0]
    assert (row["probe_success"], row["effective_ratio"]) == (0.5, (own + 1) / 2)
    exposed.close()


# What the teacher reads.


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{prompt} Think first.", "must hold {prompt} and {reference}, and no other field"),
        ("{reference}", "must hold {prompt} and {reference}, and no other field"),
        ("{prompt}{reference}{}", "must hold {prompt} and {reference}, and no other field"),
        ("{prompt}{reference}{answer}", "must hold {prompt} and {reference}, and no other field"),
        ("{prompt}{reference:>9}", "must hold {prompt} and {reference}, and no other field"),
        (
            "{prompt}{reference} {",
            "Single '{' encountered in format string; write a brace that is text twice, {{ or }}",
        ),
    ],
)
def test_a_template_that_cannot_word_the_teachers_message_is_refused_before_the_training(
    swift: Any, verl: Any, tmp_path: Path, template: str, said: str
):
    with pytest.raises(ConfigError, match=f"template: .*{re.escape(said)}"):
        swift.expose(PROBED, tmp_path / "run", template)
    with pytest.raises(ConfigError, match=f"bridge.template: .*{re.escape(said)}"):
        verl.own_settings({"bridge": {"settings": "exposure.yaml", "out": "run", "template": template}})


def test_a_brace_that_is_text_is_written_twice(swift: Any, verl: Any, tmp_path: Path):
    template = "{{{prompt}}} {reference}"
    exposed = callback(swift, {"exposure": {"kind": "full"}}, tmp_path, template)
    sample = SimpleNamespace(messages=[{"role": "user", "content": "2 + 3 + 4?"}], teacher_prompt=REFERENCE)
    assert exposed.view(sample) == f"{{2 + 3 + 4?}} {REFERENCE}"
    exposed.close()
    mine = verl.own_settings({"bridge": {"settings": "exposure.yaml", "out": "run", "template": template}})
    assert verl.teacher_messages([{"role": "user", "content": "2?"}], "2", mine["template"])[0]["content"] == "{2?} 2"
    assert verl.own_settings({"bridge": {"settings": "exposure.yaml", "out": "run"}})["template"] == verl._TEMPLATE
