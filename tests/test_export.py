"""`atesd export`: what comes out is the trained model, loads without us, and nothing else is written or sent."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from atesd import cli, export
from atesd.errors import AtesdError, ConfigError, ModelError, RunError
from atesd.export import Exported, export_run, push
from atesd.models.load import load_model
from atesd.models.quiet import quiet
from atesd.runs import RunFolder
from atesd.session import config_of_trained
from fake_run import begin_run, fake_config
from quick import finished, quick
from tiny import tiny_folder, tiny_tokenizer

IDS = torch.tensor([[3, 9, 12, 7]])
ADAPTER = ("model.lora={rank: 2, alpha: 4}", "train.learning_rate=0.01")
SHORT = ("train.num_updates=2", "train.evaluate_every=0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A whole model, an adapter, and an adapter on bfloat16 weights, each after two updates."""
    kinds = {"whole": (), "adapter": ADAPTER, "rough": (*ADAPTER, "model.dtype=bfloat16")}
    folder = tmp_path_factory.mktemp("runs")
    return {name: finished(quick(*SHORT, *settings), folder / name) for name, settings in kinds.items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def trained(run: RunFolder, dtype: str) -> torch.Tensor:
    """As evaluations read the run; in float32 where that is what was exported."""
    model = config_of_trained(run).model
    wide = model.model_copy(update={"dtype": "float32"})
    return logits(load_model(wide if dtype == "float32" else model).model)


@pytest.mark.parametrize(
    ("name", "merged", "dtype", "kind"),
    [
        ("whole", False, None, "model"),
        ("whole", False, "bfloat16", "model"),
        ("adapter", False, None, "adapter"),
        ("adapter", True, None, "merged"),
        ("rough", False, None, "adapter"),
        ("rough", True, None, "merged"),
        ("rough", True, "float32", "merged"),
    ],
)
def test_what_is_exported_loads_without_us_and_gives_the_trained_logits(
    runs: dict[str, RunFolder], tmp_path: Path, name: str, merged: bool, dtype: str | None, kind: str
):
    done = export_run(runs[name], tmp_path / "out", merged=merged, dtype=dtype)
    assert (done.kind, done.dtype) == (kind, dtype or ("bfloat16" if name == "rough" else "float32"))
    assert done.difference <= export.TOLERANCES[done.dtype]
    loader = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
    with quiet():
        model = loader.from_pretrained(done.folder, dtype=getattr(torch, done.dtype)).eval()
    wanted = trained(runs[name], done.dtype)
    torch.testing.assert_close(
        logits(model), wanted, rtol=0, atol=export.TOLERANCES[done.dtype] * wanted.abs().max().item()
    )
    card = (done.folder / "README.md").read_text("utf-8")
    assert ("AutoPeftModelForCausalLM" in card) is (kind == "adapter")
    assert "## Export" in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_whose_logits_differ_is_not_written(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = export.save_model

    def damaged(loaded, folder):
        with torch.no_grad():
            loaded.model.get_input_embeddings().weight[9] += 0.1
        save(loaded, folder)

    monkeypatch.setattr(export, "save_model", damaged)
    with pytest.raises(RunError, match=r"was not written: .* allowed in float32 are 0.0001"):
        export_run(runs["whole"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_rounding_would_swallow_is_refused_with_what_helps(tmp_path: Path):
    settings = (*SHORT, "model.lora={rank: 2, alpha: 4}", "model.dtype=bfloat16", "train.learning_rate=1e-6")
    run = finished(quick(*settings), tmp_path / "run")
    with pytest.raises(ModelError, match=r"to bfloat16 would swallow \d+ % .* --dtype float32"):
        export_run(run, tmp_path / "out", merged=True)
    done = export_run(run, tmp_path / "out", merged=True, dtype="float32")
    assert done.lost == pytest.approx(0.0, abs=0.05)


def test_the_adapter_keeps_the_revision_of_its_base(runs: dict[str, RunFolder], tmp_path: Path, monkeypatch):
    # A local base has no revisions: the trainer's, which PEFT does not write, must be in the file all the same.
    export._copy_adapter(_with_revision(runs["adapter"], "abc", monkeypatch), tmp_path / "part")
    assert '"revision": "abc"' in (tmp_path / "part" / "adapter_config.json").read_text("utf-8")


def test_an_exported_adapter_names_its_base_from_anywhere(runs: dict[str, RunFolder], tmp_path: Path, monkeypatch):
    # As a run of an earlier version on `model.path: base` had it.
    shutil.copytree(runs["adapter"].path, tmp_path / "run")
    described = tmp_path / "run" / "adapter" / "adapter_config.json"
    settings = json.loads(described.read_text("utf-8"))
    shutil.copytree(settings["base_model_name_or_path"], tmp_path / "base")
    described.write_text(json.dumps({**settings, "base_model_name_or_path": "base"}), "utf-8")
    monkeypatch.chdir(tmp_path)
    done = export_run(RunFolder.open(tmp_path / "run"), tmp_path / "out")
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    assert (named, done.base) == (str(tmp_path / "base"),) * 2


def _with_revision(run: RunFolder, revision: str, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    config = run.config
    model = config.model.model_copy(update={"revision": revision})
    monkeypatch.setattr(RunFolder, "config", property(lambda _: config.model_copy(update={"model": model})))
    return run


def untrained(tmp_path: Path, _: dict[str, RunFolder]) -> Exported:
    return export_run(begin_run(tmp_path / "run", fake_config(8)), tmp_path / "out")


def onto_something(tmp_path: Path, runs: dict[str, RunFolder]) -> Exported:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    return export_run(runs["whole"], tmp_path / "out")


def without_adapter(tmp_path: Path, runs: dict[str, RunFolder]) -> Exported:
    return export_run(runs["whole"], tmp_path / "out", merged=True)


def rounded_adapter(tmp_path: Path, runs: dict[str, RunFolder]) -> Exported:
    return export_run(runs["adapter"], tmp_path / "out", dtype="bfloat16")


def one_side_of_a_tied_head(tmp_path: Path, _: dict[str, RunFolder]) -> Exported:
    config = fake_config(8, model={"path": str(tiny_folder(tmp_path / "base")), "lora": {}, "max_context_tokens": 200})
    run = begin_run(tmp_path / "run", config)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with quiet():
        get_peft_model(base, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")).save_pretrained(
            run.final, save_embedding_layers=False
        )
    tiny_tokenizer().save_pretrained(run.final)
    run.end_session("finished")
    return export_run(run, tmp_path / "out", merged=True)


@pytest.mark.parametrize(
    ("attempt", "kind", "message"),
    [
        (untrained, RunError, "has no trained model yet"),
        (onto_something, RunError, "already holds something; give another --out"),
        (without_adapter, ConfigError, "trained no adapter"),
        (rounded_adapter, ConfigError, "add --merged, or leave --dtype out"),
        (one_side_of_a_tied_head, ModelError, "lm_head shares its weight"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    runs: dict[str, RunFolder], tmp_path: Path, attempt, kind: type[AtesdError], message: str
):
    with pytest.raises(kind, match=message):
        attempt(tmp_path, runs)
    assert not (tmp_path / "out" / "config.json").exists()


def test_nothing_is_sent_unless_asked_and_what_the_hub_refuses_is_said_with_the_folder(
    runs: dict[str, RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sent: list[tuple[str, ...]] = []
    monkeypatch.setattr(export, "push", lambda folder, name: sent.append((str(folder), name)) or "https://hub/me/it")
    for words, uploads in ((["--out", "a"], 0), (["--out", "b", "--push", "me/it"], 1)):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["atesd", "export", str(runs["whole"].path), *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        assert len(sent) == uploads
    assert sent == [("b", "me/it")]
    assert "pushed: https://hub/me/it" in capsys.readouterr().out


def test_an_upload_that_fails_is_an_error_of_ours_and_the_export_stays(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"--push me/it: .*; the export is whole in .*HF_HUB_OFFLINE unset"):
        push(tmp_path, "me/it")
    with pytest.raises(ConfigError, match="expected OWNER/NAME"):
        export.require_hub_name("a b")


@pytest.mark.parametrize("private", [True, False])
def test_nothing_is_uploaded_to_a_repository_that_is_public(tmp_path: Path, monkeypatch, private: bool):
    sent: list[str] = []
    hub = "huggingface_hub.HfApi"
    monkeypatch.setattr(f"{hub}.create_repo", lambda *_, **__: "https://hub/me/it")
    monkeypatch.setattr(f"{hub}.repo_info", lambda *_, **__: SimpleNamespace(private=private))
    monkeypatch.setattr(f"{hub}.upload_folder", lambda *_, **given: sent.append(given["repo_id"]))
    if private:
        assert push(tmp_path, "me/it") == "https://hub/me/it"
    else:
        with pytest.raises(RunError, match=r"--push me/it: https://hub/me/it is there already and public; make[^`]*$"):
            push(tmp_path, "me/it")
    assert sent == ["me/it"] * private
