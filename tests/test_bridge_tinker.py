"""The bridge for tinker-cookbook against its released package: what it touches, and its own loop on a stub server."""

from __future__ import annotations

import asyncio
import inspect
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atesd.bridges.core import Feedback, Handle
from atesd.errors import ConfigError, DataError
from atesd.runs import RunFolder

sdft = pytest.importorskip(
    "tinker_cookbook.distillation.sdft", reason="needs tinker-cookbook; make test-bridges", exc_type=ImportError
)
tinker = pytest.importorskip("tinker")

from atesd.bridges.tinker import Exposed, Tap, expose  # noqa: E402

pytestmark = [pytest.mark.bridges, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

UPDATES = 6
QUESTIONS = ["2 + 3 + 4?", "6 * 7?"]
ANSWERS = ["First 2 + 3 = 5.\nThen 5 + 4 = 9.\nSo \\boxed{9}.", "6 * 7 = 42.\nYes.\n\\boxed{42}"]
CREDIT = {"progress_signal": "train_kl", "hold_updates": 1, "lookahead_updates": 1}
BANDIT = {"exposure": {"kind": "bandit"}, "credit": CREDIT}
HALF = {"exposure": {"kind": "fixed", "reveal_ratio": 0.5}}


class Batches:
    """The same two problems in every batch."""

    def __len__(self) -> int:
        return UPDATES

    def get_batch(self, index: int) -> tuple[list[Any], list[str], list[str]]:  # noqa: ARG002
        builder = SimpleNamespace(logging_tags=list)
        return [builder, builder], list(QUESTIONS), list(ANSWERS)


class Server:
    """Stands for Tinker's service: a teacher whose scores depend on the length of its prompt, and nothing to train."""

    def __init__(self, **_: Any) -> None: ...

    async def create_lora_training_client(self, *_: Any, **__: Any) -> Server:
        return self

    create_training_client_from_state_with_optimizer = create_lora_training_client

    def create_sampling_client(self, **_: Any) -> Any:
        return SimpleNamespace(result=lambda: self)

    def compute_logprobs(self, sequence: Any) -> Any:
        async def scores() -> list[float]:
            return [-len(sequence.to_ints()) / 100] * sequence.length

        return SimpleNamespace(coroutine=scores)


class Letters:
    """A renderer whose tokens are characters."""

    def build_generation_prompt(self, messages: list[dict[str, str]]) -> Any:
        SEEN.append(messages[-1]["content"])
        return tinker.ModelInput.from_ints([ord(letter) for letter in messages[-1]["content"]])


SEEN: list[str] = []


def datum() -> Any:
    values = {"target_tokens": [11, 12, 13], "mask": [0.0, 1.0, 1.0], "logprobs": [0.0, -1.0, -2.0]}
    inputs = {name: tinker.TensorData.from_torch(__import__("torch").tensor(some)) for name, some in values.items()}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints([10, 11, 12]), loss_fn_inputs=inputs)


async def nothing(*_: Any, **__: Any) -> Any:
    return Server(), {}


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what talks to the service; the loop, the teacher's prompts and the loss stay tinker-cookbook's."""
    SEEN.clear()
    rollouts = ([datum(), datum()], [{"group_idx": 0}, {"group_idx": 1}])
    monkeypatch.setattr(sdft.tinker, "ServiceClient", Server)
    monkeypatch.setattr(sdft, "get_tokenizer", lambda _: "none")
    monkeypatch.setattr(sdft.renderers, "get_renderer", lambda *_, **__: Letters())
    monkeypatch.setattr(sdft.model_info, "warn_if_renderer_not_recommended", lambda *_: None)
    monkeypatch.setattr(sdft.checkpoint_utils, "check_renderer_name_for_checkpoint_async", nothing)
    monkeypatch.setattr(
        sdft.checkpoint_utils, "CheckpointManager", lambda **_: SimpleNamespace(save_final_async=nothing)
    )
    monkeypatch.setattr(sdft, "save_checkpoint_and_get_sampling_client", nothing)
    monkeypatch.setattr(sdft, "do_group_rollout_and_filter_constant_reward", nothing)
    monkeypatch.setattr(sdft, "compute_trajectory_metrics", lambda *_: {"env/all/reward/total": 0.25})
    monkeypatch.setattr(sdft, "compute_advantages", lambda _: [])
    monkeypatch.setattr(sdft, "assemble_training_data", lambda *_: rollouts)
    monkeypatch.setattr(sdft, "colorize_example", lambda *_, **__: "")
    monkeypatch.setattr(sdft, "train_step", nothing)


def settings_of(folder: Path, **changes: Any) -> Any:
    given = {
        "model_name": "some-model",
        "recipe_name": "test",
        "renderer_name": "role_colon",
        "topk": 0,
        "eval_every": 0,
    }
    return sdft.Config(**{**given, "log_path": str(folder / "log"), **changes})


def trained(folder: Path, settings: dict[str, Any], **changes: Any) -> Exposed:
    cfg = settings_of(folder, **changes)
    exposed = expose(Batches(), cfg, settings, folder / "run")
    with exposed.listening():
        asyncio.run(sdft.main(cfg, exposed))
    return exposed


def test_the_version_is_one_that_the_bridge_was_written_for():
    assert metadata.version("tinker-cookbook").split(".")[:2] == ["0", "6"]


def test_what_the_bridge_touches_is_where_it_was():
    assert list(inspect.signature(sdft.main).parameters) == ["cfg", "sdft_dataset", "test_dataset"]
    assert list(inspect.signature(sdft.SDFTBatchProvider.get_batch).parameters) == ["self", "index"]
    loop = inspect.getsource(sdft.main)
    for line in (
        "ml_logger = ml_log.setup_logging(",
        "sdft_dataset.get_batch(i_batch)",
        "for i_batch in range(start_batch, num_batches)",
        '"progress/batch": i_batch',
        '"optim/lr": cfg.learning_rate',
        "ml_logger.log_metrics(metrics, step=i_batch)",
        "golden_answer=golden_answer",
    ):
        assert line in loop
    assert loop.index("run_evals") < loop.index("get_batch") < loop.index('"train"') < loop.index("log_metrics(")
    source = inspect.getsource(sdft)
    assert all(f'metrics["{name}"]' in source for name in ("sdft/mean_advantage", "sdft/reverse_kl_mean"))
    fields = set(sdft.Config.__annotations__)
    assert {"topk", "reverse", "max_steps", "eval_every", "save_every", "log_path", "max_context_length"} <= fields


def test_a_provider_with_the_bridge_is_still_a_provider(tmp_path: Path):
    assert isinstance(expose(Batches(), settings_of(tmp_path), HALF, tmp_path / "run"), sdft.SDFTBatchProvider)


@pytest.mark.parametrize(("settings", "whole"), [(HALF, False), ({"exposure": {"kind": "full"}}, True)])
def test_the_teacher_reads_the_view_of_the_golden_answer(settings: dict[str, Any], whole: bool, tmp_path: Path):
    trained(tmp_path, settings)
    note = "[The reference may be incomplete from here on.]"
    cut = [f"First 2 + 3 = 5.\n{note}\nFinal answer: \\boxed{{9}}", f"6 * 7 = 42.\n{note}\nFinal answer: \\boxed{{42}}"]
    read = ANSWERS if whole else cut
    template = sdft.DEFAULT_DEMO_TEMPLATE
    expected = [template.format(question=q, golden_answer=a) for q, a in zip(QUESTIONS, read, strict=True)]
    assert expected * UPDATES == SEEN


def test_the_run_is_recorded_with_the_divergence_that_was_logged(tmp_path: Path):
    trained(tmp_path, HALF)
    rows = RunFolder.open(tmp_path / "run").whole_rows("metrics")
    assert [row["update"] for row in rows] == list(range(UPDATES))
    # The teacher scores each token at minus a hundredth of its length; the student at -1 and -2.
    teacher = sum(-(len(prompt) + 2) / 100 for prompt in SEEN[:2]) / 2
    assert rows[0]["loss"] == pytest.approx(-1.5 - teacher)
    assert RunFolder.open(tmp_path / "run").manifest["status"] == "finished"


def test_a_cut_run_goes_on_with_its_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Cut(Batches):
        def get_batch(self, index: int) -> tuple[list[Any], list[str], list[str]]:
            if index == 4:
                raise KeyboardInterrupt
            return super().get_batch(index)

    cfg = settings_of(tmp_path)
    cut = expose(Cut(), cfg, BANDIT, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), cut.listening():
        asyncio.run(sdft.main(cfg, cut))
    monkeypatch.setattr(
        sdft.checkpoint_utils, "get_last_checkpoint", lambda _: SimpleNamespace(batch=3, state_path="there")
    )
    exposed = trained(tmp_path, BANDIT)
    unbroken = Handle(exposed.config)
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert len(rows) == UPDATES
    for row in rows:
        assert row["reveal_ratio"] == unbroken.ratio(row["update"])
        unbroken.observe(row["update"], Feedback(row["loss"]))


def test_the_logger_is_itself_again_afterwards(tmp_path: Path):
    before = sdft.ml_log.setup_logging
    with expose(Batches(), settings_of(tmp_path), HALF, tmp_path / "run").listening():
        assert sdft.ml_log.setup_logging is not before
    assert sdft.ml_log.setup_logging is before


def test_a_tap_passes_everything_on():
    heard: list[Any] = []
    real = SimpleNamespace(log_metrics=lambda metrics, step: heard.append((metrics, step)), store="the store")
    tap = Tap(real, lambda _, step: heard.append(step))
    tap.log_metrics({"test/x": 1.0}, step=0)
    tap.log_metrics({"progress/batch": 3}, step=3)
    assert heard == [({"test/x": 1.0}, 0), ({"progress/batch": 3}, 3), 3]
    assert tap.store == "the store"


@pytest.mark.parametrize(
    ("settings", "changes", "metrics", "says"),
    [
        ({"exposure": {"kind": "bandti"}}, {}, {}, "bandit"),
        (BANDIT, {"topk": 20}, {}, "train_kl is not measured"),
        (HALF, {}, {"probe_sucess": "test/correct"}, "probe_sucess, which no exposure knows"),
        (
            {"exposure": {"kind": "bandit"}},
            {"eval_every": 3},
            {"probe_success": "test/correct"},
            "eval_every: 3: the exposure wants probe_success before update 4",
        ),
    ],
)
def test_what_will_not_do_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], metrics: Any, says: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=says):
        expose(Batches(), settings_of(tmp_path, **changes), settings, tmp_path / "run", metrics)


def test_a_loop_that_nobody_listens_to_is_refused(tmp_path: Path):
    cfg = settings_of(tmp_path)
    with pytest.raises(ConfigError, match=r"outside of exposed\.listening"):
        asyncio.run(sdft.main(cfg, expose(Batches(), cfg, HALF, tmp_path / "run")))


def test_an_answer_that_is_not_known_is_refused(tmp_path: Path):
    class Open(Batches):
        def get_batch(self, index: int) -> tuple[list[Any], list[str], list[str]]:
            return *super().get_batch(index)[:2], ["no box", "none here"]

    cfg = settings_of(tmp_path)
    exposed = expose(Open(), cfg, HALF, tmp_path / "run")
    with pytest.raises(DataError, match="row 0: the reference has no"), exposed.listening():
        asyncio.run(sdft.main(cfg, exposed))
