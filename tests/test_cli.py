"""The command line as a user meets it: what it prints, what it refuses, how it ends."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from atesd import cli
from atesd.cli import scores
from atesd.cli.commands import run_name
from atesd.cli.display import LiveBar, PlainLines, Progress, closing_lines, evaluation_line, fitting
from atesd.cli.options import BAD_INPUT, CODES, EXIT_CODES, FAILED, INTERRUPTED, code_of
from atesd.cli.plan import segment_line
from atesd.cli.settings import annotated_yaml
from atesd.config import Config, CreditConfig, PolicyConfig, config_from_mapping, load_config, parse_yaml, recipe_names
from atesd.control.budget import affordable, decisions
from atesd.control.learned import LearnedExposure
from atesd.errors import CheckpointError, ConfigError, DataError, ModelError, RunError, TrainingError
from atesd.records import UpdateStats
from atesd.runs import RunFolder
from atesd_lab.sweep import jobs
from fake_run import begin_run, fake_config, metric_row, write_fake_run
from quick import SMALL_LEARNED as SMALL

SETTINGS = [word for setting in SMALL for word in ("--set", setting)]


class Shell:
    """Runs `atesd` in this process and keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["atesd", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = self._capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return code


@pytest.fixture
def atesd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of eight tiny updates made by `atesd train`; what it printed is in stdout.txt."""
    folder = tmp_path_factory.mktemp("trained")
    with (
        pytest.MonkeyPatch.context() as patch,
        (folder / "stdout.txt").open("w") as stdout,
        contextlib.redirect_stdout(stdout),
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["atesd", "train", "micro", *SETTINGS])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    return RunFolder.open(folder / "runs" / "micro")


# Help, errors, exit codes


def modules_used(*words: str) -> tuple[int, set[str]]:
    code = (
        "import sys; sys.argv = ['atesd', *sys.argv[1:]]\nfrom atesd.cli import main\n"
        "try:\n    main()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    return done.returncode, set(done.stderr.split())


def test_help_imports_nothing_heavy():
    code, modules = modules_used("--help")
    assert code == 0
    assert {"torch", "transformers", "pydantic", "numpy", "rich", "yaml"} & modules == set()


@pytest.mark.parametrize(
    "words", ["train micro", "preview micro", "profile micro", "config micro", "sweep micro-ratios"]
)
def test_a_config_error_is_answered_before_anything_heavy_is_imported(words: str):
    code, modules = modules_used(*words.split(), "--set", "train.nun_updates=3")
    assert code == 2
    assert {"torch", "transformers", "scipy", "rich"} & modules == set()


def test_help_names_every_verb_and_every_exit_code(atesd: Shell):
    assert atesd("--help") == 0
    verbs = (
        "train",
        "evaluate",
        "export",
        "preview",
        "profile",
        "report",
        "compare",
        "recipes",
        "config",
        "demo",
        "sweep",
        "models",
        "world",
    )
    assert [verb for verb in verbs if f"\n  {verb} " not in atesd.out] == []
    assert EXIT_CODES in " ".join(atesd.out.split())


def test_the_version_is_that_of_the_package(atesd: Shell):
    assert atesd("--version") == 0
    assert atesd.out == f"atesd {version('atesd')}\n"


def test_each_exit_code_has_one_meaning_which_the_docs_have_too():
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text("utf-8")
    told = dict(
        re.findall(r"^\| (\d+) \| (.*) \|$", page.partition("## Exit codes")[2].partition("\n## ")[0], re.MULTILINE)
    )
    assert {int(code): meaning for code, meaning in told.items()} == CODES
    assert INTERRUPTED == jobs.INTERRUPTED
    kinds = {kind: code_of(kind("")) for kind in (ConfigError, DataError, ModelError, RunError, CheckpointError)}
    assert [kinds[kind] for kind in kinds] == [BAD_INPUT, BAD_INPUT, BAD_INPUT, FAILED, FAILED]
    assert code_of(TrainingError("")) == code_of(OSError()) == FAILED


def test_an_interrupt_at_once_is_told_from_a_failure(atesd: Shell, trained: RunFolder, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scores, "evaluate_target", interrupted)
    assert atesd("evaluate", str(trained.path)) == INTERRUPTED


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "micro", "--set", "train.seed=x"], 2, "error: micro: train.seed: 'x' is not allowed; expected an i"),
        (["train", "mirco"], 2, "error: 'mirco' is neither a file nor a recipe; did you mean micro?"),
        (["train", "micro", "--set", "model.path=world:z", "--dry-run"], 2, "there is no embedded model world:z"),
        (["preview", "micro", "--problem", "9999"], 2, "--problem 9999: there are 4096 training problems, 0 to 4095"),
        (["preview", "micro", "--ratios", "0,2"], 2, "--ratios 0,2: expected at least 0 and at most 1"),
        (["preview", "micro", "--ratios", "a"], 2, "--ratios a: expected numbers with commas"),
        (["evaluate", "some-model"], 2, "some-model is no run folder, so say on which problems"),
        (["report", "nowhere"], 1, "error: nowhere is not a run folder"),
        (["world", "pretrain", "ugly"], 2, "world pretrain ugly: expected one of good"),
        (["train"], 2, "Missing argument"),
        (["train", "micro", "--resume", "maybe"], 2, "maybe"),
        (["trian"], 2, "trian"),
        (["sweep"], 2, "sweep: which plan?"),
        (["sweep", "mico-ratios"], 2, "'mico-ratios' is neither a file nor a plan; did you mean micro-ratios?"),
        (["sweep", "micro-ratios", "--set", "exposure.reveal_ratio=1"], 2, "exposure.reveal_ratio is decided twice"),
    ],
)
def test_bad_input_gives_a_message_an_exit_code_and_no_traceback(
    atesd: Shell, words: list[str], code: int, message: str
):
    assert atesd(*words) == code
    assert message in atesd.err
    assert "Traceback" not in atesd.err
    assert atesd.out == ""


def test_what_a_user_wrote_is_neither_markup_nor_a_terminal_command(atesd: Shell):
    assert atesd("train", "[red]x[/red]\x1b[31m") == 2
    assert "[red]x[/red]" in atesd.err
    assert "\x1b" not in atesd.err


# recipes, config, preview, dry run


def test_recipes_lists_each_with_its_first_line(atesd: Shell):
    assert atesd("recipes") == 0
    assert [line.split()[0] for line in atesd.out.splitlines()] == recipe_names()
    assert max(map(len, atesd.out.splitlines())) <= 132


@pytest.mark.parametrize("name", recipe_names())
def test_the_annotated_config_is_yaml_that_loads_to_the_same_config(name: str):
    text = annotated_yaml(load_config(name))
    assert config_from_mapping(parse_yaml(text, "printed")) == load_config(name)
    settings = [line for line in text.splitlines() if line and not line.endswith(":")]
    assert [line for line in settings if "  # " not in line] == []


def test_the_annotated_config_says_the_default_where_another_value_is_in_force(atesd: Shell):
    assert atesd("config", "micro", "--set", "train.seed=3") == 0
    assert "  seed: 3  # every draw of the run is a function of it; default 0\n" in atesd.out
    assert "  leap_share: 0.5  # share q of problems whose reference leaps; default 0.0\n" in atesd.out
    assert "  weights: frozen  # the initial policy: OPSD\n" in atesd.out


def test_a_printed_config_is_a_recipe(atesd: Shell):
    atesd("config", "micro")
    Path("mine.yaml").write_text(atesd.out)
    assert atesd("config", "mine.yaml") == 0
    assert atesd.out == Path("mine.yaml").read_text()


def test_preview_shows_more_of_the_reference_as_the_ratio_grows(atesd: Shell):
    assert atesd("preview", "micro", "--problem", "3", "--ratios", "0,0.5,1") == 0
    header, *contexts = atesd.out.split("===== ")
    assert header.startswith("problem ")
    assert "student's context ends with " in header
    assert "problems that spell a control token of the tokenizer: 0 of " in header
    assert [context.split(",")[0].split(":")[0] for context in contexts] == [
        "student",
        "teacher at ratio 0",
        "teacher at ratio 0.5",
        "teacher at ratio 1",
    ]
    assert [context.count(" ;") for context in contexts] == sorted(context.count(" ;") for context in contexts)
    assert "\\boxed" not in contexts[0]
    assert all("\\boxed" in context for context in contexts[1:])
    assert "effective ratio 1.00" in contexts[-1]


def test_a_dry_run_says_what_is_planned_and_writes_nothing(atesd: Shell, tmp_path: Path):
    assert atesd("train", "micro", "--dry-run", *SETTINGS) == 0
    lines = atesd.out.splitlines()
    # 8 updates at hold 2 are 4 decisions; the last, taken before update 6, would be rewarded at update 8
    for expected in (
        "problems: train 24, validation 4, probe 4, test 4",
        "rows skipped: 0",
        "problems that spell a control token of the tokenizer: 0 of 24 (it is read as text)",
        "student's context ends with the message itself, teacher's with the message itself: the same",
        "updates: 8, with 32 rollouts (distill)",
        "evaluations: 4 on validation, 2 on test, with 24 completions",  # after 0, 3, 6, 8 updates
        "exposure decisions: 4, 3 of them rewarded in time",
    ):
        assert expected in lines
    assert any(line.startswith("teacher context at ratio 1: median 41, longest 41 tokens") for line in lines)
    assert any(line.startswith("contexts of the first 24 training problems: student up to ") for line in lines)
    assert [line.partition(":")[0] for line in lines[:3]] == ["policy updates", "it fits", "problems"]
    assert lines[-1] == "nothing was trained and nothing was written (--dry-run)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("window_start", ["decision", "hold_end"])
@pytest.mark.parametrize(("hold", "lookahead", "updates"), [(4, 4, 100), (1, 3, 17), (3, 7, 40), (5, 2, 21), (4, 4, 3)])
def test_what_a_budget_affords_is_what_the_controller_does_with_it(
    window_start: str, hold: int, lookahead: int, updates: int
):
    credit = CreditConfig.model_validate(
        {"hold_updates": hold, "lookahead_updates": lookahead, "window_start": window_start, "preset": "paper"}
    )
    policy = PolicyConfig(decisions_per_policy_update=2)
    exposure = LearnedExposure(num_updates=updates, credit=credit, policy=policy)
    consumed, taken = 0, set()
    for update in range(updates):
        ratio = exposure.reveal_ratio(update)
        taken.add(ratio)
        stats = UpdateStats(ratio, ratio, 1 / (1 + update), 0.1, 0.1, 0.5, probe_nll=1.0, grounding=-1.0 - update % 5)
        consumed += len(exposure.observe(update, stats))
    assert affordable(updates, credit, policy)[1] == consumed // 2
    assert decisions(updates, credit) == len(taken)


def test_many_kinds_of_references_are_grouped_by_ten_segments():
    assert segment_line([2, 3, 3]) == "segments: 2: 1, 3: 2"
    assert segment_line(range(25)) == "segments: 0-9: 10, 10-19: 10, 20-29: 5"


# Training


def test_a_run_in_a_pipe_is_told_line_by_line(trained: RunFolder):
    lines = (trained.path.parent.parent / "stdout.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("update ")] == [f"{n}/8" for n in range(1, 9)]
    assert [line.split(":")[0] for line in lines if "Average@" in line] == [
        "validation after 0 updates",
        "test after 0 updates",
        "validation after 3 updates",
        "validation after 6 updates",
        "validation after 8 updates",
        "test after 8 updates",
    ]
    assert "finished: 8 of 8 updates" in lines
    assert "run folder: runs/micro" in lines
    assert lines[-1] == "report: atesd report runs/micro"


def test_a_line_holds_loss_ratio_reward_accuracy_and_time_left(trained: RunFolder):
    lines = (trained.path.parent.parent / "stdout.txt").read_text().splitlines()
    rewards = [row["reward"] for row in trained.rows("decisions") if row["status"] == "finished"]
    last = next(line for line in lines if line.startswith("update 8/8"))
    row = trained.rows("metrics")[-1]
    assert f"ratio {row['reveal_ratio']:.2f}" in last
    assert f"reward {rewards[-1]:+.3f}" in last
    assert f"accuracy {100 * row['accuracy']:.1f} %" in last
    assert "left 0.0 s" in last


def test_training_a_finished_run_again_writes_nothing_at_all(atesd: Shell, trained: RunFolder):
    def files() -> dict[Path, bytes]:
        kept = (path for path in trained.path.rglob("*") if path.is_file() and path.name[0] != ".")
        return {path: path.read_bytes() for path in kept}

    before = files()
    assert atesd("train", "micro", *SETTINGS, "--out", str(trained.path)) == 0
    assert "is finished: nothing is left to train" in atesd.out
    assert "finished: 8 of 8 updates" in atesd.out
    assert files() == before
    assert len(trained.manifest["sessions"]) == 1


def test_a_finished_run_that_has_lost_its_model_is_given_it_again(atesd: Shell, trained: RunFolder, tmp_path: Path):
    copy = RunFolder.open(shutil.copytree(trained.path, tmp_path / "copy"))
    shutil.rmtree(copy.final)
    assert atesd("train", "micro", *SETTINGS, "--out", str(copy.path)) == 0
    assert copy.final.is_dir()
    assert len(copy.manifest["sessions"]) == 2


def test_a_run_is_not_overwritten_where_resuming_is_not_wanted(atesd: Shell, trained: RunFolder):
    assert atesd("train", "micro", *SETTINGS, "--out", str(trained.path), "--resume", "never") == 1
    assert "already holds a run" in atesd.err


def test_a_run_is_named_after_its_recipe_or_file():
    assert run_name("some/mine.v2.yaml") == "mine.v2"
    assert run_name("qwen3-1.7b") == "qwen3-1.7b"


def test_sigterm_saves_and_ends_with_code_3_and_the_same_command_goes_on(tmp_path: Path):
    small = [word for setting in SMALL if "log_samples" not in setting for word in ("--set", setting)]
    words = [sys.executable, "-m", "atesd.cli", "train", "micro", *small, "--set", "train.num_updates=300"]
    words += ["--set", "train.evaluate_every=0", "--out", "run"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("update 2/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    run = RunFolder.open(tmp_path / "run")
    done = len(run.rows("metrics"))
    assert process.returncode == 3
    assert f"stopped after {done} of 300 updates; the same command resumes" in rest
    assert run.manifest["status"] == "stopped"
    assert (run.checkpoints / f"update-{done:06d}").is_dir()


# Evaluating


def test_the_evaluation_that_a_run_ended_with_is_found_again_and_not_written_twice(atesd: Shell, trained: RunFolder):
    before = trained.rows("evaluations")
    assert atesd("evaluate", str(trained.path)) == 0
    assert "holds this very evaluation" in atesd.out
    assert "all" in atesd.out
    assert trained.rows("evaluations") == before


def test_another_number_of_samples_is_a_new_row_once(atesd: Shell, trained: RunFolder):
    before = len(trained.rows("evaluations"))
    assert atesd("evaluate", str(trained.path), "--samples", "3", "--split", "validation") == 0
    assert "written to" in atesd.out
    assert "Average@3, %" in atesd.out
    assert atesd("evaluate", str(trained.path), "--samples", "3", "--split", "validation") == 0
    row = trained.rows("evaluations")[-1]
    assert len(trained.rows("evaluations")) == before + 1
    assert (row["split"], row["samples"], row["update"]) == ("validation", 3, 8)


def test_a_run_on_other_problems_is_not_written_into_it(atesd: Shell, trained: RunFolder):
    before = trained.rows("evaluations")
    words = ["--data", "micro-steps", "--set", "data.test_size=4", "--set", "data.train_size=4"]
    assert atesd("evaluate", str(trained.path), *words) == 0
    assert "these are not the problems of" in atesd.out
    assert trained.rows("evaluations") == before


def test_a_model_is_evaluated_on_the_problems_of_a_recipe(atesd: Shell):
    assert atesd("evaluate", "world:a", "--data", "micro", "--samples", "1", *SETTINGS) == 0
    assert "world:a on test\n" in atesd.out  # of a model nobody knows after how many updates
    assert "difficulty 2" in atesd.out
    assert "nothing was written" in atesd.out


def test_a_model_is_evaluated_on_every_row_of_a_file(atesd: Shell, trained: RunFolder):
    rows = [{"problem": f"1 + {n}", "answer": str(n + 1)} for n in range(3)]
    Path("bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", "bench.jsonl", "--set", "sampling.completion_tokens=4", "--samples", "1"]
    assert atesd("evaluate", str(trained.final), *words) == 0, atesd.err
    assert [line.split()[1] for line in atesd.out.splitlines() if line.startswith("all")] == ["3"]


def test_a_run_keeps_its_evaluation_on_a_file_under_the_name_of_the_file(atesd: Shell, trained: RunFolder):
    Path("bench.jsonl").write_text(json.dumps({"problem": "1 + 1", "answer": "2"}) + "\n")
    words = ["--data", "bench.jsonl", "--set", "sampling.completion_tokens=4", "--samples", "1"]
    before = len(trained.rows("evaluations"))
    for said in ("written to", "holds this very evaluation"):
        assert atesd("evaluate", str(trained.path), *words) == 0, atesd.err
        assert said in atesd.out
    row = trained.rows("evaluations")[-1]
    assert len(trained.rows("evaluations")) == before + 1
    assert (row["split"], row["update"], row["problems"]) == ("bench.jsonl", 8, 1)
    sha256 = hashlib.sha256(b"1 + 1\t2").hexdigest()
    assert row["content"] == {"sha256": sha256, "checker": "math"}


def test_a_run_that_holds_out_nothing_is_told_what_to_be_evaluated_on(atesd: Shell, tmp_path: Path):
    run = begin_run(tmp_path / "run", fake_config(8, data={"source": "world", "test_size": 0}))
    run.end_session("finished")
    assert atesd("evaluate", str(run.path)) == 2
    assert (
        "holds out no test problems (data.test_size: 0), so say on which: --benchmark NAMES, or --data FILE.jsonl"
        in atesd.err
    )


def test_a_run_that_is_not_finished_is_not_evaluated(atesd: Shell, tmp_path: Path):
    run = begin_run(tmp_path / "begun", fake_config(8))
    assert atesd("evaluate", str(run.path)) == 1
    assert "is running; let `atesd train` finish it first" in atesd.err


def test_a_report_is_written_into_the_first_run(atesd: Shell, tmp_path: Path):
    run = write_fake_run(tmp_path / "run", updates=8)
    assert atesd("report", str(run.path)) == 0
    assert atesd.out == f"report: {run.report}\n"
    assert run.report.read_text().startswith("<!doctype html>")


# Display


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return begin_run(tmp_path / "run", fake_config(10))


def row_of(update: int, **changes: object) -> dict[str, object]:
    return metric_row(update, 0.5, np.random.default_rng(0), seconds={"sample": 2.0, "evaluate": 1.0}, **changes)


def test_the_time_left_is_the_mean_of_this_sessions_updates_times_those_to_come(run: RunFolder):
    progress = Progress(run.config, run.path)
    assert progress.seconds_left is None
    progress.update(row_of(3))  # resumed: 4 of 10 are done after it
    assert progress.seconds_left == 6 * 3.0


def test_before_the_first_update_the_time_spent_is_shown_as_a_sign_of_life(run: RunFolder):
    assert Progress(run.config, run.path).figures() == ["update 0/10", "preparing, 0.0 s"]


def test_a_skipped_update_is_shown_as_one(run: RunFolder):
    progress = Progress(run.config, run.path)
    progress.update(row_of(0, skipped="non-finite loss or gradient", loss=None))
    assert "SKIPPED: non-finite loss or gradient" in progress.figures()


def test_what_does_not_fit_is_left_out_but_the_time_left_stays():
    figures = ["update 1/9", "loss 0.1", "ratio 0.50", "left 9 s"]
    assert fitting(figures, 100) == "update 1/9  loss 0.1  ratio 0.50  left 9 s"
    assert fitting(figures, 30) == "update 1/9  loss 0.1  left 9 s"
    assert fitting(figures, 20) == "update 1/9  left 9 s"
    assert fitting(figures, 5) == "update 1/9"


@pytest.mark.parametrize("width", [20, 50, 120])
def test_the_bar_stays_within_the_terminal(run: RunFolder, width: int):
    progress = Progress(run.config, run.path)
    progress.update(row_of(3))
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True, legacy_windows=False)
    console.print(LiveBar(progress, console))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= width
    assert "update 4/10" in lines[1]


def test_messages_are_never_markup_and_hide_nothing(run: RunFolder):
    progress = Progress(run.config, run.path)
    console = Console(file=io.StringIO(), width=80, color_system=None)
    plain = io.StringIO()
    for listener in (LiveBar(progress, console), PlainLines(progress, plain)):
        listener.message("[bold]row 3[/bold] :smile: \x1b[2J \u202eabc")
    for text in (console.file.getvalue(), plain.getvalue()):
        assert text == "[bold]row 3[/bold] :smile: ⟦U+001B⟧[2J ⟦U+202E⟧abc\n"


def test_an_evaluation_is_told_on_one_line(tmp_path: Path):
    run = write_fake_run(tmp_path / "run", updates=4)
    line = evaluation_line(run.rows("evaluations")[-1])
    assert line.startswith("test after 0 updates: Average@2 ")
    assert "\n" not in line


def test_the_summary_divides_tokens_by_the_time_of_training(run: RunFolder):
    config: Config = run.config
    for update in range(2):
        run.append("metrics", row_of(update, completion_tokens=10.0))
    lines = closing_lines(run, config, "stopped")
    # 2 updates x 32 rollouts x 10 tokens = 640 in 2 x 2 s; the evaluations took 2 of the 6 seconds
    assert lines[0] == "stopped after 2 of 10 updates; the same command resumes"
    assert lines[1] == "640 completion tokens in 4.0 s of training: 160 tokens per second"
    assert "sample 67 %" in lines[2]
    assert "evaluate 33 %" in lines[2]
    assert not any(line.startswith("trained model") for line in lines)


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "atesd.cli", "recipes"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "micro" in done.stdout
