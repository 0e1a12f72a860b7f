"""The bridge for verl against its released package: what it touches, its worker's method, its trainer's hooks."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atesd.bridges.core import Feedback, Handle
from atesd.bridges.owner import Owner
from atesd.config import dump_config
from atesd.errors import ConfigError, DataError, TrainingError
from atesd.runs import RunFolder

try:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of engines that are not installed
        from omegaconf import OmegaConf
        from verl.experimental.teacher_loop.teacher_manager import _pad_teacher_outputs
        from verl.trainer.distillation import losses
        from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base
        from verl.trainer.ppo.v1.trainer_base import PPOTrainer
        from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
        from verl.utils.import_utils import load_class_from_fqn

        from atesd.bridges import verl as bridge
        from atesd.bridges.verl import own_settings, run_config, teacher_messages
except ImportError as error:
    pytest.skip(f"needs verl and what it imports: {error}; make test-bridges", allow_module_level=True)

pytestmark = pytest.mark.bridges

UPDATES = 6
REFERENCE = "First 2 + 3 = 5.\nThen 5 + 4 = 9.\nSo \\boxed{9}."
HALF = "exposure: {kind: fixed, reveal_ratio: 0.5}\n"
BANDIT = "exposure: {kind: bandit}\ncredit: {progress_signal: train_kl, hold_updates: 1, lookahead_updates: 1}\n"
ROW = {
    "raw_prompt": [{"role": "user", "content": "2 + 3 + 4?"}],
    "extra_info": {"reference": REFERENCE, "index": 7},
    "global_steps": 1,
}


def config_of(folder: Path, settings: str = HALF, **mine: Any) -> Any:
    """Verl's own default config, as its release generates it, with our group."""
    file = Path(inspect.getfile(trainer_base)).parents[2] / "config/_generated_ppo_trainer.yaml"
    config = OmegaConf.load(file)
    (folder / "exposure.yaml").write_text(settings)
    config.bridge = {"settings": str(folder / "exposure.yaml"), "out": str(folder / "run"), **mine}
    config.trainer.default_local_dir = str(folder / "checkpoints")
    return config


class Actor:
    """Stands for ray's handle on the driver's actor: calls are answered at once."""

    def __init__(self, driver: Owner) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        async def answered(*given: Any) -> Any:
            return getattr(self._driver, name)(*given)

        return SimpleNamespace(remote=answered)


def driver_of(folder: Path, settings: str = HALF, updates_done: int = 0) -> Owner:
    config = config_of(folder, settings)
    checkpoint = str(folder / "checkpoints" / f"global_step_{updates_done}")
    made = run_config(config, own_settings(config), UPDATES)
    return Owner(dump_config(made), str(folder / "run"), "verl", updates_done, checkpoint)


# What the bridge touches.


def test_the_version_is_one_that_the_bridge_was_written_for() -> None:
    assert metadata.version("verl").split(".")[:2] == ["0", "9"]


def test_the_trainer_is_registered_and_the_manager_is_found_by_its_name() -> None:
    assert get_trainer_cls("atesd") is bridge.ExposedTrainer
    assert load_class_from_fqn("atesd.bridges.verl.ExposedManager", "AgentLoopManager") is bridge.ExposedManager


def test_verl_loads_the_bridge_and_the_bridge_says_so() -> None:
    code = "import verl; from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('atesd').__name__)"
    variables = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "atesd.bridges.verl"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    assert "registered verl trainer 'atesd'" in done.stderr
    assert done.stdout.split()[-1] == "ExposedTrainer"


def test_the_workers_method_and_its_call_are_as_they_were() -> None:
    plain = bridge.ExposedWorker.__bases__[0]
    expected = ["self", "output", "prompt_ids", "response_ids", "validate", "sample_kwargs"]
    assert (
        list(inspect.signature(plain._compute_teacher_logprobs).parameters)[:6] == expected
    )  # ray adds one of its own
    call = inspect.getsource(plain._agent_loop_postprocess)
    for passed in ("prompt_ids=final_output.prompt_ids", "validate=validate", "sample_kwargs=kwargs"):
        assert passed in call
    assert 'kwargs["global_steps"]' in call
    source = inspect.getsource(plain._compute_teacher_logprobs)
    assert 'output.extra_fields["teacher_ids"]' in source
    assert 'output.extra_fields["teacher_logprobs"]' in source


def test_the_trainers_loop_calls_its_hooks_in_the_order_that_the_bridge_relies_on() -> None:
    loop = inspect.getsource(PPOTrainer.fit)
    loop = loop[loop.index("while current_epoch") :]
    hooks = [
        "self.on_step_begin()",
        "self.step(",
        "self._save_checkpoint()",
        "self._validate()",
        "self._compute_metrics(",
    ]
    places = [loop.index(hook) for hook in hooks]
    assert places == sorted(places)
    expected = ["self", "batch", "metrics", "timing_raw", "global_steps", "epoch"]
    assert list(inspect.signature(PPOTrainer._compute_metrics).parameters) == expected
    assert "global_steps=self.global_steps, epoch=" in loop
    setup = inspect.getsource(trainer_base)
    assert 'f"global_step_{self.global_steps}"' in inspect.getsource(PPOTrainer._save_checkpoint)
    assert setup.index("self.total_training_steps = ") > 0
    assert 'rename_dict(output["metrics"], "actor/")' in inspect.getsource(PPOTrainer._update_actor)
    assert 'policy_metrics["distillation/loss"]' in inspect.getsource(losses)


def test_the_default_config_has_what_the_bridge_reads(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    made = run_config(config, own_settings(config), UPDATES)
    assert made.train.num_updates == UPDATES
    assert made.sampling.completion_tokens == config.actor_rollout_ref.rollout.response_length
    assert "val_before_train" in config.trainer


# What its objects do.


class Letters:
    """A tokenizer whose tokens are characters, and whose template writes a chat's last message."""

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in chat[-1]["content"]]}


class Teacher:
    """Stands for verl's teacher manager: scores each token by its place."""

    def __init__(self, room: int = 10_000) -> None:
        self.asked: list[list[int]] = []
        inference = SimpleNamespace(max_model_len=room, prompt_length=1, response_length=1)
        self.teacher_model_configs = {"teacher": SimpleNamespace(inference=inference)}

    async def compute_teacher_logprobs_single(self, sequence_ids: list[int], **_: Any) -> tuple[Any, Any]:
        self.asked.append(sequence_ids)
        ids = torch.tensor(sequence_ids, dtype=torch.int32)[:, None]
        return ids, -torch.arange(len(sequence_ids), dtype=torch.float32)[:, None]


def worker_of(folder: Path, teacher: Teacher, driver: Owner, monkeypatch: pytest.MonkeyPatch) -> Any:
    worker = object.__new__(bridge.ExposedWorker)
    worker.config, worker.tokenizer, worker.teacher_server_manager = config_of(folder), Letters(), teacher
    worker.distillation_enabled, worker.teacher_key = True, "data_source"
    monkeypatch.setattr(bridge.ray, "get_actor", lambda name: {bridge.ACTOR: Actor(driver)}[name])
    return worker


def scored(worker: Any, prompt: list[int], response: list[int], validate: bool = False, row: Any = ROW) -> Any:
    output = SimpleNamespace(extra_fields={}, multi_modal_data=None, mm_processor_kwargs=None)
    asyncio.run(worker._compute_teacher_logprobs(output, prompt, response, validate, row))
    return output.extra_fields


def test_the_teacher_reads_the_view_in_front_of_the_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, driver = Teacher(), driver_of(tmp_path)
    fields = scored(worker_of(tmp_path, teacher, driver, monkeypatch), [1, 2, 3], [7, 8])
    note = "[The reference may be incomplete from here on.]"
    seen = f"First 2 + 3 = 5.\n{note}\nFinal answer: \\boxed{{9}}"
    template = own_settings(config_of(tmp_path))["template"]
    view = [ord(letter) for letter in template.format(prompt="2 + 3 + 4?", reference=seen)]
    assert teacher.asked == [[*view, 7, 8]]
    # In the student's frame, 5 tokens long, stand the teacher's last 5: the response keeps its scores.
    assert fields["teacher_ids"][-2:, 0].tolist() == [7, 8]
    assert fields["teacher_logprobs"][:, 0].tolist() == [-float(i) for i in range(len(view) - 3, len(view) + 2)]
    padded, _ = _pad_teacher_outputs(
        fields["teacher_ids"], fields["teacher_logprobs"], prompt_width=6, response_width=4, prompt_length=3,
        response_length=2, pad_token_id=0,
    )  # fmt: skip
    assert padded.shape == (1, 10, 1)


def test_a_view_shorter_than_the_students_prompt_is_padded_in_front() -> None:
    framed = bridge.in_students_frame(torch.tensor([[1.0], [2.0], [3.0]]), 5)
    assert framed[:, 0].tolist() == [0.0, 0.0, 1.0, 2.0, 3.0]


def test_a_validation_is_scored_as_verl_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Teacher()
    assert scored(worker_of(tmp_path, teacher, driver_of(tmp_path), monkeypatch), [1], [2], validate=True) == {}
    assert teacher.asked == []


@pytest.mark.parametrize(
    ("row", "room", "says"),
    [
        ({**ROW, "extra_info": {}}, 10_000, r"'2 \+ 3 \+ 4\?', row 0: the reference is {}"),
        ({**ROW, "extra_info": {"reference": "no box"}}, 10_000, "no answer is stated"),
        (ROW, 50, "room for 50 tokens, but view and response need"),
    ],
)
def test_what_a_worker_cannot_show_stops_the_training(
    row: Any, room: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = driver_of(tmp_path)
    with pytest.raises(DataError, match=says):
        scored(worker_of(tmp_path, Teacher(room), driver, monkeypatch), [1], [2], row=row)
    with pytest.raises(TrainingError, match="1 rollouts had no teacher"):
        driver.told(0, 1.0, 1e-5, {}, None)


def test_the_last_message_is_worded_and_those_before_it_stay() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert teacher_messages(chat, "4", "{prompt} See: {reference}") == [
        chat[0],
        {"role": "user", "content": "2 + 2? See: 4"},
    ]


def test_a_resumed_run_continues_the_controller(tmp_path: Path) -> None:
    def play(driver: Owner, first: int, last: int) -> None:
        for update in range(first, last):
            driver.show(update, "2 + 3 + 4?", {"reference": REFERENCE})
            saved = str(tmp_path / "checkpoints" / f"global_step_{update + 1}") if update + 1 == 3 else None
            driver.told(update, 1.0 / (update + 1), 1e-5, {}, saved)

    cut = driver_of(tmp_path, BANDIT)
    play(cut, 0, 5)
    cut._log.close()
    again = driver_of(tmp_path, BANDIT, updates_done=3)
    play(again, 3, UPDATES)
    again.end(finished=True)
    config = config_of(tmp_path, BANDIT)
    unbroken = Handle(run_config(config, own_settings(config), UPDATES))
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert len(rows) == UPDATES
    for row in rows:
        assert row["reveal_ratio"] == unbroken.ratio(row["update"])
        unbroken.observe(row["update"], Feedback(row["loss"]))


def test_a_validation_counts_as_the_probe_of_the_next_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    found = iter([{"val/acc": 0.1}, {"val/acc": 0.2}])
    monkeypatch.setattr(PPOTrainerSync, "_validate", lambda _: next(found))
    monkeypatch.setattr(PPOTrainerSync, "_compute_metrics", lambda *_, **__: None)
    monkeypatch.setattr(PPOTrainerSync, "_save_checkpoint", lambda _: None)
    monkeypatch.setattr(bridge.ray, "get", lambda given: heard.append(given) if isinstance(given, tuple) else given)
    trainer = object.__new__(bridge.ExposedTrainer)
    trainer.config, trainer.global_steps = config_of(tmp_path), 1
    trainer._own = {"metrics": {"probe_success": "val/acc", "train_success": "critic/score/mean"}}
    told, due = SimpleNamespace(remote=lambda *given: given), SimpleNamespace(remote=lambda _: {"probe_success"})
    trainer._exposure = SimpleNamespace(told=told, due=due)
    trainer._validate()  # before training
    for step in (1, 2):
        trainer.global_steps = step
        trainer.on_step_begin()
        metrics = {"actor/distillation/loss": 0.5, "actor/lr": 1e-5, "critic/score/mean": 0.75}
        if step == 1:
            trainer._save_checkpoint()
            metrics |= trainer._validate()
        trainer._compute_metrics(None, metrics, {}, global_steps=step, epoch=0)
    folder = str(tmp_path / "checkpoints/global_step_1")
    values = [{"probe_success": 0.1, "train_success": 0.75}, {"probe_success": 0.2, "train_success": 0.75}]
    assert heard == [(0, 0.5, 1e-5, values[0], folder), (1, 0.5, 1e-5, values[1], None)]


@pytest.mark.parametrize(
    ("settings", "changes", "says"),
    [
        ("exposure: {kind: fixd}\n", {}, "fixed"),
        (HALF, {"setings": "x"}, r"unknown \['setings'\]"),
        (BANDIT, {"policy_gradient": True}, "train_kl is not measured"),
        (HALF, {"metrics": {"probe_sucess": "val/acc"}}, "probe_sucess, which no exposure knows"),
        (
            "exposure: {kind: bandit}\n",
            {"test_freq": 3},
            "trainer.test_freq: 3: the exposure wants probe_success before",
        ),
        (
            "exposure: {kind: bandit}\n",
            {"test_freq": 4, "first": False},
            "trainer.val_before_train: the exposure wants",
        ),
    ],
)
def test_what_will_not_do_is_refused(settings: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    mine = (
        {"setings": "x"} if "setings" in changes else {"metrics": changes.get("metrics", {"probe_success": "val/acc"})}
    )
    config = config_of(tmp_path, settings, **mine)
    config.distillation.distillation_loss.use_policy_gradient = changes.get("policy_gradient", False)
    config.trainer.test_freq, config.trainer.val_before_train = changes.get("test_freq", -1), changes.get("first", True)
    with pytest.raises(ConfigError, match=says):
        run_config(config, own_settings(config), UPDATES)


def test_a_run_without_our_manager_is_refused() -> None:
    trainer = object.__new__(bridge.ExposedTrainer)
    with pytest.raises(ConfigError, match=r"set it to atesd\.bridges\.verl\.ExposedManager"):
        trainer.fit(object())


def test_a_loss_that_was_not_logged_is_not_known(tmp_path: Path) -> None:
    driver = driver_of(tmp_path)
    driver.told(0, math.nan, 1e-5, {"train_success": 0.5}, None)
    row = RunFolder.open(tmp_path / "run").rows("metrics")[0]
    assert (row["loss"], row["kl"], row["accuracy"], row["skipped"]) == (None, None, 0.5, None)
