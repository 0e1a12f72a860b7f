"""TRL 1.16's own SDFTTrainer and SDPOTrainer with the bridge: what their teacher reads, what is recorded, resumes."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import TrainerCallback

import test_peer_trl
from atesd.bridges.core import Feedback, Handle
from atesd.bridges.problems import problem_of
from atesd.bridges.trl import Exposed, expose
from atesd.config import Config, FixedSettings, FullSettings, ModelConfig, load_config
from atesd.data.views import TextRenderer
from atesd.errors import CheckpointError, ConfigError, DataError, RunError
from atesd.models.load import load_model, save_model
from atesd.models.prompts import PromptEncoder
from atesd.runs import RunFolder
from atesd_lab.audit.audit import run_audit
from atesd_lab.report.page import write_report
from test_peer_trl import PROBLEMS, SAMPLES, TRL_WORDING, our_rows, peer_config, pytestmark, unpadded
from test_ranks import outputs, start_ranks
from tiny import tiny_model

__all__ = ["pytestmark"]  # needs trl, and takes no note of its two warnings

UPDATES = 6
FEEDBACK = "Line one.\nLine two. And more.\nLine three.\nThe last."
CREDIT = {"progress_signal": "train_kl", "hold_updates": 1, "lookahead_updates": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"exposure": {"kind": "full"}},
    "fixed": {"exposure": {"kind": "fixed", "reveal_ratio": 0.5}},
    "learned": {"exposure": {"kind": "learned", "policy": {"decisions_per_policy_update": 2}}, "credit": CREDIT},
    "bandit": {"exposure": {"kind": "bandit"}, "credit": CREDIT},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 whose tokens are single characters."""
    folder = tmp_path_factory.mktemp("bridge") / "model"
    loaded = tiny_model(list(string.printable))
    loaded.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    save_model(loaded, folder)
    return folder


class Witness(TrainerCallback):
    """Writes down what TRL does: its batches and its losses."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.stop_after = stop_after

    def on_self_distillation_batch_prepared(self, **parts: Any) -> None:
        names = ("prompt_ids", "completion_ids", "teacher_input_ids", "teacher_attention_mask")
        self.batches.append({name: parts[name].clone() for name in names})

    def on_log(self, *_: Any, **parts: Any) -> None:
        if "loss" in parts["logs"]:
            self.losses.append(parts["logs"]["loss"])

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == self.stop_after:
            raise KeyboardInterrupt


def common(out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "distillation_mode": "full_logits",
        "distillation_alpha": 0.0,
        "distillation_is_clip": None,
        "teacher_model_kind": "base",
        "max_prompt_length": None,
        "max_completion_length": 12,
        "num_generations": SAMPLES,
        "per_device_train_batch_size": SAMPLES * len(PROBLEMS) // 2,
        "gradient_accumulation_steps": 2,
        "max_steps": UPDATES,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "output_dir": str(out),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }


def chats() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": problem.text}] for problem in PROBLEMS]


def sdft(model: Path, out: Path, witness: Witness, **changes: Any) -> Any:
    from datasets import Dataset

    trl = pytest.importorskip("trl.experimental.sdft", reason="needs the extra `trl`")
    rows = [
        {"prompt": chat, "privileged_context": problem.reference}
        for chat, problem in zip(chats(), PROBLEMS, strict=True)
    ]
    arguments = trl.SDFTConfig(**common(out, **changes))
    return trl.SDFTTrainer(model=str(model), args=arguments, train_dataset=Dataset.from_list(rows), callbacks=[witness])


def sdpo(model: Path, out: Path, witness: Witness, **changes: Any) -> Any:
    """A rollout of more than two characters that are not spaces is called a success: about half of them are."""
    from datasets import Dataset

    trl = pytest.importorskip("trl.experimental.sdpo", reason="needs the extra `trl`")
    rows = [{"prompt": chat, "privileged_context": FEEDBACK} for chat in chats()]
    arguments = trl.SDPOConfig(**common(out, include_environment_feedback=True, **changes))
    return trl.SDPOTrainer(
        model=str(model),
        reward_funcs=lambda completions, **_: [float(len(c[0]["content"]) % 3 > 0) for c in completions],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        callbacks=[witness],
    )


Make = Callable[..., Any]
MAKERS: dict[str, Make] = {"sdft": sdft, "sdpo": sdpo}


def trained(
    make: Make, model: Path, out: Path, kind: str | None, **changes: Any
) -> tuple[Witness, Any, Exposed | None]:
    witness = Witness()
    trainer = make(model, out / "trainer", witness, **changes)
    exposed = expose(trainer, {**SETTINGS[kind], "data": {"checker": "exact"}}, out / "run") if kind else None
    trainer.train()
    return witness, trainer, exposed


@pytest.mark.parametrize("name", MAKERS)
def test_full_exposure_is_the_trainer_without_the_bridge_bit_for_bit(name: str, model: Path, tmp_path: Path) -> None:
    plain, without, _ = trained(MAKERS[name], model, tmp_path / "plain", None)
    ours, exposed, _ = trained(MAKERS[name], model, tmp_path / "ours", "full")
    assert ours.losses == plain.losses
    assert len(plain.batches) >= UPDATES
    for one, other in zip(plain.batches, ours.batches, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    weights = exposed.model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in without.model.state_dict().items())


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_teacher_of_sdft_reads_our_view_id_by_id(
    ratio: float, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tuple(problem_of(problem.text, problem.reference) for problem in PROBLEMS)
    monkeypatch.setattr(test_peer_trl, "PROBLEMS", ours)
    witness = Witness()
    trainer = sdft(model, tmp_path / "trainer", witness, shuffle_dataset=False)
    settings = {"exposure": {"kind": "fixed", "reveal_ratio": ratio}, "data": {"checker": "exact"}}
    expose(trainer, settings, tmp_path / "run")
    trainer.train()
    config = peer_config(model, views=TRL_WORDING).model_copy(update={"exposure": FixedSettings(reveal_ratio=ratio)})
    whole = config.model_copy(update={"exposure": FullSettings()})
    for batch in witness.batches:
        rows = unpadded(batch, trainer.processing_class.pad_token_id)
        completions = [row.completion for row in rows]
        assert rows == our_rows(config, completions)
        assert rows != our_rows(whole, completions)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_teacher_of_sdpo_reads_our_view_of_solution_and_feedback_id_by_id(
    ratio: float, model: Path, tmp_path: Path
) -> None:
    witness = Witness()
    trainer = sdpo(model, tmp_path / "trainer", witness, max_completion_length=40, shuffle_dataset=False)
    settings = {"exposure": {"kind": "fixed", "reveal_ratio": ratio}, "data": {"segmenter": "token"}}
    exposed = expose(trainer, settings, tmp_path / "run")
    trainer.train()
    encoder = PromptEncoder(load_model(ModelConfig(path=str(model))).tokenizer, exposed.config.model)
    renderer = TextRenderer(exposed.config.views.model_copy(update={"answer": "withhold"}))

    def part(prompt: str, text: str) -> str:
        """Our loop's view of a reference without an answer: the first floor(r m) of its m segments, and a note."""
        problem = problem_of(prompt, text, segmenter="token")
        shown = math.floor(Fraction(str(ratio)) * len(problem.segments))
        return renderer.visible(problem, shown, whole=ratio == 1)

    told, cut = {True: 0, False: 0}, 0
    for batch in witness.batches:
        tokens = batch["completion_ids"].shape[1]
        said = [trainer.processing_class.decode(ids, skip_special_tokens=True) for ids in batch["completion_ids"]]
        pairs = zip(batch["teacher_input_ids"], batch["teacher_attention_mask"].bool(), strict=True)
        for row, (ids, mask) in enumerate(pairs):
            group = range(row // SAMPLES * SAMPLES, (row // SAMPLES + 1) * SAMPLES)
            right = [one for one in group if one != row and len(said[one]) % 3 > 0]  # TRL shows none its own
            prompt = PROBLEMS[row // SAMPLES].text
            solution = trainer.args.solution_template.format(
                successful_previous_attempt=part(prompt, said[right[0]]) if right else ""
            )
            text = trainer.args.reprompt_template.format(
                prompt=prompt,
                solution=solution if right else "",
                feedback=trainer.args.feedback_template.format(feedback_raw=part(prompt, FEEDBACK)),
            )
            assert tuple(ids[:-tokens][mask[:-tokens]].tolist()) == encoder.student(text)
            told[bool(right)] += 1
            cut += bool(right) and part(prompt, said[right[0]]) != said[right[0]]
    assert min(told.values()) > 0
    assert (cut > 0) == (ratio < 1)
    assert len({part("?", FEEDBACK), FEEDBACK}) == (2 if ratio < 1 else 1)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["fixed", "learned", "bandit"])
def test_a_run_is_recorded_and_reported(name: str, kind: str, model: Path, tmp_path: Path) -> None:
    _, trainer, _ = trained(MAKERS[name], model, tmp_path, kind)
    run = RunFolder.open(tmp_path / "run")
    rows = run.whole_rows("metrics")
    assert [row["update"] for row in rows] == list(range(UPDATES))
    assert run.manifest["status"] == "finished"
    key = f"{name}/distillation_loss"
    logged = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert [row["loss"] for row in rows] == pytest.approx(logged)
    assert all(row["kl"] == row["loss"] for row in rows)  # full logits at alpha 0 are the forward KL
    ratios = {row["reveal_ratio"] for row in rows}
    assert ratios == {0.5} if kind == "fixed" else len(ratios) > 1
    decisions = run.whole_rows("decisions")
    assert len(decisions) == (0 if kind == "fixed" else UPDATES)
    assert "trl 1.16" in write_report([run.path], tmp_path / "report.html").read_text("utf-8")


def test_success_is_what_the_trainer_rewards(model: Path, tmp_path: Path) -> None:
    _, trainer, _ = trained(sdpo, model, tmp_path, "fixed")
    key = "self_distillation/reward_mean"
    rewards = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(set(rewards)) > 1
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert [row["accuracy"] for row in rows] == pytest.approx(rewards)


def test_how_often_the_trainer_logs_changes_nothing(model: Path, tmp_path: Path) -> None:
    for steps in (1, 4):
        trained(sdft, model, tmp_path / str(steps), "bandit", logging_steps=steps)
    assert RunFolder.open(tmp_path / "1/run").rows("metrics") == RunFolder.open(tmp_path / "4/run").rows("metrics")


def test_epochs_are_counted_in_updates(model: Path, tmp_path: Path) -> None:
    trained(sdft, model, tmp_path, "learned", max_steps=-1, num_train_epochs=3)
    run = RunFolder.open(tmp_path / "run")
    assert (run.config.train.num_updates, len(run.rows("metrics"))) == (3, 3)


def test_a_trainer_without_distillation_has_no_loss_to_tell(model: Path, tmp_path: Path) -> None:
    trained(sdpo, model, tmp_path, "fixed", distillation_weight=0.0)
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert [(row["loss"], row["skipped"]) for row in rows] == [(None, None)] * UPDATES


def test_a_second_exposure_of_a_trainer_is_refused(model: Path, tmp_path: Path) -> None:
    trainer = sdft(model, tmp_path / "trainer", Witness())
    expose(trainer, SETTINGS["full"], tmp_path / "run")
    with pytest.raises(ConfigError, match="builds contexts by Demonstrations"):
        expose(trainer, SETTINGS["full"], tmp_path / "run")


def test_a_batch_that_serves_two_updates_keeps_its_ratio(model: Path, tmp_path: Path) -> None:
    credit = {**CREDIT, "hold_updates": 2, "lookahead_updates": 2}
    witness = Witness()
    trainer = sdft(model, tmp_path / "trainer", witness, num_iterations=2)
    expose(trainer, {"exposure": {"kind": "bandit"}, "credit": credit, "data": {"checker": "exact"}}, tmp_path / "run")
    trainer.train()
    assert len(witness.batches) == UPDATES // 2
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    keys = ("reveal_ratio", "effective_ratio", "accuracy")
    assert all(one[key] == other[key] for one, other in zip(rows[::2], rows[1::2], strict=True) for key in keys)
    with pytest.raises(ConfigError, match="no multiple of 2"):
        expose(sdft(model, tmp_path / "t", Witness(), num_iterations=2), SETTINGS["bandit"], tmp_path / "odd")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["learned", "bandit"])
def test_a_resumed_run_continues_the_controller(name: str, kind: str, model: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    settings = {**SETTINGS[kind], "data": {"checker": "exact"}}
    trained(MAKERS[name], model, tmp_path / "whole", kind, **saving)
    cut = MAKERS[name](model, tmp_path / "cut/trainer", Witness(stop_after=5), **saving)
    exposed = expose(cut, settings, tmp_path / "cut/run")
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    exposed.close()
    again = MAKERS[name](model, tmp_path / "cut/trainer", Witness(), **saving)
    expose(again, settings, tmp_path / "cut/run")
    again.train(resume_from_checkpoint=True)
    run, whole = RunFolder.open(tmp_path / "cut/run"), RunFolder.open(tmp_path / "whole/run")
    assert len(run.manifest["sessions"]) == 2
    assert run.rows("metrics")[:3] == whole.rows("metrics")[:3]
    # TRL itself does not resume exactly: other prompts follow. So the controller is compared with one that was told of
    # the same updates without a break.
    unbroken = Handle(exposed.config)
    for row in run.rows("metrics"):
        assert row["reveal_ratio"] == unbroken.ratio(row["update"])
        unbroken.observe(row["update"], Feedback(row["loss"], row["kl"]))
    assert len(run.rows("metrics")) == UPDATES


def test_a_resume_without_the_controllers_state_is_refused(model: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trained(sdft, model, tmp_path, "bandit", **saving)
    for file in sorted((tmp_path / "trainer/checkpoint-6/atesd").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    again = sdft(model, tmp_path / "trainer", Witness(), **saving)
    expose(again, {**SETTINGS["bandit"], "data": {"checker": "exact"}}, tmp_path / "run")
    with pytest.raises(CheckpointError, match="expected the controller's state after 6 updates, found none"):
        again.train(resume_from_checkpoint=True)


def test_the_audit_reads_the_config_of_the_run(model: Path, tmp_path: Path) -> None:
    rows = [
        {"problem": f"{a} + {b}?", "solution": f"It is {a} + {b}.\n\\boxed{{{a + b}}}"}
        for a in range(9)
        for b in range(9)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    trainer = sdft(model, tmp_path / "trainer", Witness())
    data = {"source": str(tmp_path / "sums.jsonl"), "checker": "exact", "on_few_rows": "shrink"}
    expose(trainer, {**SETTINGS["learned"], "data": data}, tmp_path / "run")
    trainer.train()
    config: Config = load_config(str(tmp_path / "run/config.yaml"))
    audit = run_audit(config, rollouts=8, repeats=2, decisions=20, seeds=2, effect=None, say=lambda _: None)
    assert audit.rollouts == 8
    assert audit.budget.updates == UPDATES


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({}, {"exposure": {"kind": "learnd"}}, "learned"),
        ({}, {"exposure": {"kind": "learned"}}, "probe_success is not measured in trl"),
        ({"max_prompt_length": 512}, SETTINGS["full"], "max_prompt_length: 512: TRL keeps the last"),
        (
            {"steps_per_generation": 3, "generation_batch_size": None},
            SETTINGS["full"],
            "teacher's contexts of two ratios",
        ),
    ],
)
def test_what_will_not_do_is_refused_before_training(
    changes: dict[str, Any], settings: dict[str, Any], says: str, model: Path, tmp_path: Path
) -> None:
    trainer = sdft(model, tmp_path / "trainer", Witness(), **changes)
    with pytest.raises(ConfigError, match=says):
        expose(trainer, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_trainer_is_refused(tmp_path: Path) -> None:
    class Other:
        teacher_context_builder = "none of ours"

    with pytest.raises(ConfigError, match="builds contexts by str"):
        expose(Other(), SETTINGS["full"], tmp_path)


def test_a_prompt_that_sdpo_would_cut_stops_the_training(model: Path, tmp_path: Path) -> None:
    trainer = sdpo(model, tmp_path / "trainer", Witness(), max_reprompt_len=40)
    exposed = expose(trainer, SETTINGS["full"], tmp_path / "run")
    with pytest.raises(DataError, match="max_reprompt_len: 40"):
        trainer.train()
    exposed.close()


def test_an_evaluation_shows_the_teacher_all_and_leaves_the_controller_alone(model: Path, tmp_path: Path) -> None:
    _, trainer, exposed = trained(sdft, model, tmp_path, "bandit")
    assert exposed is not None
    assert exposed.handle is not None
    before = exposed.handle.state_dict()
    trainer.model.eval()
    assert exposed.visible(PROBLEMS[0]) == PROBLEMS[0].reference
    assert exposed.handle.state_dict() == before


def test_a_measure_is_called_when_the_exposure_wants_it(model: Path, tmp_path: Path) -> None:
    asked: list[int] = []
    trainer = sdft(model, tmp_path / "trainer", Witness())
    settings = {"exposure": {"kind": "bandit"}, "credit": {"hold_updates": 2, "lookahead_updates": 2}}

    def probe() -> float:
        asked.append(trainer.state.global_step)
        return len(asked) / 10

    expose(trainer, {**settings, "data": {"checker": "exact"}}, tmp_path / "run", measure={"probe_success": probe})
    trainer.train()
    assert asked == [0, 2, 4]
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert [row["probe_success"] for row in rows] == [0.1, None, 0.2, None, 0.3, None]


def test_two_processes_share_one_ratio_and_write_their_rows_once(model: Path, tmp_path: Path) -> None:
    program = Path(__file__).with_name("trl_rank_program.py")
    outputs(start_ranks([str(program), str(model), str(tmp_path)], [tmp_path / "cwd-0", tmp_path / "cwd-1"]))
    one, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text("utf-8")) for rank in (0, 1))
    assert one == other  # both exposures, the resumed one too, to the last weight of the policy
    assert one["sdft rows"] == SAMPLES * len(PROBLEMS) // 2  # each rank had half of the rollouts
    assert one["updates"] == [UPDATES] * 2
    for name in MAKERS:
        run = RunFolder.open(tmp_path / name / "run")
        rows = run.whole_rows("metrics")
        assert [row["update"] for row in rows] == list(range(UPDATES))
        assert len({row["reveal_ratio"] for row in rows}) > 1
        assert all((row["accuracy"] or 0) * SAMPLES * len(PROBLEMS) % 1 == 0 for row in rows)
    probes = [row["probe_success"] for row in RunFolder.open(tmp_path / "sdft/run").rows("metrics")]
    assert probes == [0.5] * UPDATES  # what the ranks measure differently is told as its mean
    assert len(RunFolder.open(tmp_path / "sdft/run").manifest["sessions"]) == 2


def test_epochs_of_shuffled_rows_are_graded_by_their_own_problems(model: Path, tmp_path: Path) -> None:
    changes = {"max_steps": -1, "num_train_epochs": 4, "generation_batch_size": 4, "steps_per_generation": None}
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "shuffle_dataset": True}
    witness = Witness()
    trainer = sdft(model, tmp_path / "trainer", witness, **changes, **shape)
    settings = {"exposure": {"kind": "random", "granularity": "per_problem"}, "data": {"checker": "exact"}}
    exposed = expose(trainer, settings, tmp_path / "run")
    noted: list[list[str]] = []
    grade = exposed.graded
    exposed.graded = lambda verdicts: (noted.append([name for name, *_ in verdicts]), grade(verdicts))[1]  # type: ignore[method-assign]
    trainer.train()
    texts = {problem_of(problem.text, "").id: problem.text for problem in PROBLEMS}
    decode = trainer.processing_class.decode
    for batch, names in zip(witness.batches, noted, strict=True):
        asked = [spelled(decode(ids, skip_special_tokens=True)) for ids in batch["prompt_ids"]]
        assert all(spelled(texts[name]) in text or texts[name] in text for text, name in zip(asked, names, strict=True))
    assert len({tuple(names) for names in noted}) > 2  # the order of an epoch is not that of the one before
    assert len(RunFolder.open(tmp_path / "run").rows("metrics")) == len(noted) == 8


def spelled(text: str) -> str:
    """What a tokenizer of single characters decodes, without the spaces that it puts between them."""
    return text[::2] if text[1::2].strip() == "" else text


def test_an_interrupted_training_goes_on_in_the_same_process(model: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    settings = {**SETTINGS["bandit"], "data": {"checker": "exact"}}
    cut = sdft(model, tmp_path / "trainer", Witness(stop_after=5), **saving)
    left = expose(cut, settings, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = sdft(model, tmp_path / "trainer", Witness(), **saving)  # as in a notebook: nothing was closed
    expose(again, settings, tmp_path / "run")
    again.train(resume_from_checkpoint=True)
    assert len(RunFolder.open(tmp_path / "run").rows("metrics")) == UPDATES
    with pytest.raises(RunError, match="a later exposure of this process has resumed this run"):
        left.on_save(cut.args, cut.state)
    left.contexts.close()


def test_a_run_cannot_be_resumed_with_another_exposure(model: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trained(sdft, model, tmp_path, "bandit", **saving)
    again = sdft(model, tmp_path / "trainer", Witness(), **saving)
    exposed = expose(again, {**SETTINGS["fixed"], "data": {"checker": "exact"}}, tmp_path / "run")
    with pytest.raises(RunError, match="the config differs"):
        again.train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-3"))
    exposed.close()


def test_a_checkpoint_within_a_generation_batch_is_refused(model: Path, tmp_path: Path) -> None:
    credit = {**CREDIT, "hold_updates": 2, "lookahead_updates": 2}
    settings = {"exposure": {"kind": "bandit"}, "credit": credit, "data": {"checker": "exact"}}
    made = {"num_iterations": 2, "save_strategy": "steps"}
    with pytest.raises(ConfigError, match="save_steps: 3 is no multiple of 2"):
        expose(sdft(model, tmp_path / "a", Witness(), save_steps=3, **made), settings, tmp_path / "run")
    trainer = sdft(model, tmp_path / "b", Witness(), save_steps=2, **made)
    exposed = expose(trainer, settings, tmp_path / "run")
    trainer.state.global_step, trainer.state.max_steps = 3, UPDATES
    with pytest.raises(ConfigError, match="resume_from_checkpoint: 3 is no multiple of 2"):
        exposed.on_train_begin(trainer.args, trainer.state)


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("sdft", {"privilegd_context": "x"}, "row 0: no column privileged_context; it has prompt, privilegd_context"),
        ("sdft", {"privileged_context": " "}, "row 0: the reference is empty"),
        ("sdpo", {"feedbak": "x"}, "row 0: no column privileged_context; it has prompt, feedbak"),
    ],
)
def test_a_column_that_is_not_there_is_named(
    name: str, row: dict[str, str], says: str, model: Path, tmp_path: Path
) -> None:
    from datasets import Dataset

    trainer = MAKERS[name](model, tmp_path / "trainer", Witness())
    trainer.train_dataset = Dataset.from_list([{"prompt": chat, **row} for chat in chats()])
    with pytest.raises(DataError, match=says):
        expose(trainer, SETTINGS["full"], tmp_path / "run")


@pytest.mark.parametrize("name", MAKERS)
def test_a_teachers_row_longer_than_the_model_stops_the_training(name: str, model: Path, tmp_path: Path) -> None:
    trainer = MAKERS[name](model, tmp_path / "trainer", Witness())
    trainer.model.config.max_position_embeddings = 50
    exposed = expose(trainer, {**SETTINGS["full"], "data": {"checker": "exact"}}, tmp_path / "run")
    with pytest.raises(DataError, match="the model 50 positions"):
        trainer.train()
    exposed.close()


def test_a_measure_that_will_not_do_is_refused(model: Path, tmp_path: Path) -> None:
    trainer = sdft(model, tmp_path / "trainer", Witness())
    settings = {"exposure": {"kind": "bandit"}, "data": {"checker": "exact"}}
    typo: Any = {"probe_sucess": lambda: 1.0, "probe_success": lambda: None}
    with pytest.raises(ConfigError, match="probe_sucess, which no exposure knows"):
        expose(trainer, settings, tmp_path / "run", measure=typo)
    exposed = expose(trainer, settings, tmp_path / "run", measure={"probe_success": typo["probe_success"]})
    with pytest.raises(ConfigError, match="measure: probe_success gave None"):
        trainer.train()
    exposed.close()
