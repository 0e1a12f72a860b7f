"""The bridge for ms-swift against its released package: its samples, its callback in transformers' own loop."""

from __future__ import annotations

import inspect
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from atesd.bridges.core import Feedback, Handle
from atesd.errors import ConfigError, DataError
from atesd.runs import RunFolder

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from swift.callbacks import callbacks_map
        from swift.rl_core.data import GKDSample, OnPolicySample
        from swift.rlhf_trainers import gkd_helpers

        from atesd.bridges import swift as bridge
except ImportError as error:
    pytest.skip(f"needs ms-swift and what it imports: {error}; make test-bridges", allow_module_level=True)

pytestmark = [pytest.mark.bridges, pytest.mark.filterwarnings("ignore")]

UPDATES = 6
REFERENCE = "First 2 + 3 = 5.\nThen 5 + 4 = 9.\nSo \\boxed{9}."
HALF = {"exposure": {"kind": "fixed", "reveal_ratio": 0.5}}
CREDIT = {"progress_signal": "train_kl", "hold_updates": 1, "lookahead_updates": 1}
BANDIT = {"exposure": {"kind": "bandit"}, "credit": CREDIT}
CUT = "First 2 + 3 = 5.\n[The reference may be incomplete from here on.]\nFinal answer: \\boxed{9}"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnPolicySample, "build_teacher_view", bridge._plain)
    monkeypatch.setattr(bridge.Exposed, "active", None)
    monkeypatch.setitem(callbacks_map, "atesd", None)


def sample(**changes: Any) -> Any:
    messages = [{"role": "user", "content": "2 + 3 + 4?"}, {"role": "assistant", "content": "9"}]
    return GKDSample.from_row({"messages": messages, "teacher_prompt": REFERENCE, **changes})


class Loop(Trainer):
    """Transformers' trainer, which makes its teacher's views by ms-swift's own helper at every micro-batch."""

    seen: list[str]
    stop_after: int | None = None

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        if self.state.global_step == self.stop_after:
            raise KeyboardInterrupt
        samples = [sample()]
        assert gkd_helpers.build_opsd_samples(samples)
        self.seen.append(samples[0].teacher_messages[0]["content"])
        return model(inputs["x"]).square().mean()


def loop(folder: Path, stop_after: int | None = None, steps_per_generation: int = 1, **changes: Any) -> Loop:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 1)

        def forward(self, x: Any) -> Any:
            return self.linear(x)

    args = {"output_dir": str(folder / "trainer"), "max_steps": UPDATES, "save_steps": 3, "logging_steps": 1}
    given = TrainingArguments(**{**args, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **changes})
    given.steps_per_generation = steps_per_generation  # as ms-swift's arguments have it
    made = Loop(Net(), given, train_dataset=[{"x": torch.ones(2)}] * 8)
    made.seen, made.stop_after = [], stop_after
    made.add_callback(callbacks_map["atesd"](given, made))
    return made


# What the bridge touches.


def test_the_version_is_one_that_the_bridge_was_written_for() -> None:
    assert metadata.version("ms-swift").split(".")[:2] == ["4", "6"]


def test_what_the_bridge_touches_is_where_it_was() -> None:
    assert list(inspect.signature(OnPolicySample.build_teacher_view).parameters) == ["self"]
    assert "build_teacher_view" not in vars(GKDSample)
    assert {"teacher_prompt", "teacher_messages", "messages"} <= set(OnPolicySample.__dataclass_fields__)
    # These two are read, not imported: they want a trl below 1.0.
    package = Path(inspect.getfile(gkd_helpers)).parents[1]
    assert "callbacks_map[callback](args, self)" in (package / "trainers/mixin.py").read_text("utf-8")
    trainer = (package / "rlhf_trainers/gkd_trainer.py").read_text("utf-8")
    for helper in (gkd_helpers.encode_gkd_samples, gkd_helpers.build_opsd_samples):
        assert "s.build_teacher_view()" in inspect.getsource(helper)
    assert "encode_gkd_samples(samples, template)" in trainer
    assert "self._step % steps_per_generation == 0" in trainer


# What its objects do.


def test_the_teacher_of_a_sample_reads_the_view(tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run")
    trainer = loop(tmp_path)
    trainer.train()
    assert trainer.seen == [f"2 + 3 + 4?\n\n{CUT}"] * UPDATES
    rows = RunFolder.open(tmp_path / "run").whole_rows("metrics")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [row["loss"] for row in rows] == losses
    assert RunFolder.open(tmp_path / "run").manifest["status"] == "finished"


def test_full_exposure_is_what_a_column_with_the_whole_prompt_gives(tmp_path: Path) -> None:
    plain = sample(teacher_prompt=f"2 + 3 + 4?\n\n{REFERENCE}")
    plain.build_teacher_view()
    bridge.expose({"exposure": {"kind": "full"}}, tmp_path / "run")
    trainer = loop(tmp_path)
    trainer.train()
    assert trainer.seen == [plain.teacher_messages[0]["content"]] * UPDATES


def test_a_sample_without_a_teachers_prompt_is_left_alone(tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run")
    assert sample(teacher_prompt=None).build_teacher_view() is False


def test_an_evaluation_shows_all(tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run")
    trainer = loop(tmp_path)
    trainer.train()
    trainer.model.eval()
    seen = sample(teacher_prompt={"reference": REFERENCE, "answer": "9"})
    seen.build_teacher_view()
    assert seen.teacher_messages[0]["content"] == f"2 + 3 + 4?\n\n{REFERENCE}"


def test_a_resumed_run_continues_the_controller(tmp_path: Path) -> None:
    bridge.expose(BANDIT, tmp_path / "run")
    cut = loop(tmp_path, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert bridge.Exposed.active is not None
    bridge.Exposed.active.close()
    again = loop(tmp_path)
    again.train(resume_from_checkpoint=True)
    unbroken = Handle(bridge.Exposed.active.config)
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert len(rows) == UPDATES
    for row in rows:
        assert row["reveal_ratio"] == unbroken.ratio(row["update"])
        unbroken.observe(row["update"], Feedback(row["loss"]))


@pytest.mark.parametrize(
    ("settings", "changes", "says"),
    [
        ({"exposure": {"kind": "bandid"}}, {}, "bandit"),
        ({"exposure": {"kind": "learned"}}, {}, "probe_success is not measured in ms-swift"),
        (HALF, {"logging_steps": 10}, "logging_steps: 10"),
        (BANDIT, {"steps_per_generation": 2}, "no multiple of 2"),
        (
            {"exposure": {"kind": "bandit"}, "credit": {**CREDIT, "hold_updates": 2, "lookahead_updates": 2}},
            {"steps_per_generation": 2, "save_steps": 3},
            "save_steps: 3 is no multiple of 2",
        ),
    ],
)
def test_what_will_not_do_is_refused(settings: Any, changes: Any, says: str, tmp_path: Path) -> None:
    bridge.expose(settings, tmp_path / "run")
    with pytest.raises(ConfigError, match=says):
        loop(tmp_path, **changes)


def test_without_the_callback_the_first_sample_says_so(tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run")
    with pytest.raises(ConfigError, match="add --callbacks atesd"):
        sample().build_teacher_view()


def test_an_interrupted_training_goes_on_in_the_same_process(tmp_path: Path) -> None:
    bridge.expose(BANDIT, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path, stop_after=4).train()
    loop(tmp_path).train(resume_from_checkpoint=True)  # nothing was closed
    assert len(RunFolder.open(tmp_path / "run").rows("metrics")) == UPDATES


def test_a_reference_without_an_answer_is_refused(tmp_path: Path) -> None:
    bridge.expose(HALF, tmp_path / "run")
    loop(tmp_path)
    with pytest.raises(DataError, match=r"row 0: the reference has no"):
        sample(teacher_prompt="no box").build_teacher_view()
