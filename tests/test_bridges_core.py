"""What all bridges share: refused settings, views, feedback that comes late, a run folder that reports read."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from atesd.bridges.core import Feedback, Handle
from atesd.bridges.log import Log
from atesd.bridges.problems import Judge, columns, message_text, problem_in, problem_of, require_problems
from atesd.bridges.settings import bridge_config, require_whole_batches, taken, updates_per_batch
from atesd.config import Config
from atesd.errors import CheckpointError, ConfigError, DataError, RunError
from atesd.evaluate.benchmark import Graded
from atesd.runs import RunFolder
from atesd_lab.cli.comparison import print_comparison
from atesd_lab.report.page import write_report
from fake_run import write_fake_run

UPDATES = 24
FACTS = {"model": {"path": "some-model"}, "train": {"num_updates": UPDATES}}
CREDIT = {"progress_signal": "train_success", "hold_updates": 2, "lookahead_updates": 2}
REFERENCE = "First 2 + 3 = 5.\nThen 5 + 4 = 9.\nSo \\boxed{9}."
PROBLEM = problem_of("2 + 3 + 4?", REFERENCE)


def config(kind: str = "bandit", **groups: Any) -> Config:
    settings = {"exposure": {"kind": kind}, "data": {"checker": "exact"}, **groups}
    if settings["exposure"]["kind"] in ("learned", "bandit"):
        settings = {"credit": CREDIT, **settings}
    measurable = frozenset({"train_kl", "train_success"})
    return bridge_config(settings, FACTS, trainer="some-trainer", measurable=measurable)


def play(handle: Handle, first: int = 0, last: int = UPDATES) -> list[float]:
    """Ratios of updates whose success is the ratio: two problems each, one solved if the ratio is above a half."""
    ratios = []
    for update in range(first, last):
        ratios.append(handle.ratio(update))
        handle.observe(update, told_of(handle, update))
    return ratios


def told_of(handle: Handle, update: int) -> Feedback:
    ratio = handle.ratio(update)
    handle.grade(update, [("a", 1, 1.0), ("b", 2, float(ratio > 0.5))])
    return Feedback(loss=1.0 - ratio / 2, learning_rate=1e-3, measured={"completion_tokens": 7.0})


def test_the_core_imports_neither_torch_nor_a_trainer():
    code = "import sys; import atesd.bridges.core, atesd.bridges.log, atesd.bridges.settings; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "trl", "ray", "verl", "tinker", "swift"} & set(loaded) == set()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exposure": {"kind": "learnt"}}, "learned"),
        ({"exposure": {"kind": "bandit", "armz": 3}}, "arms"),
        ({"train": {"learning_rate": 1.0}}, "set it there"),
        ({"views": {"transition": "Now you."}}, "views.transition"),
        ({"exposure": {"kind": "learned"}}, "probe_success is not measured"),
        ({"exposure": {"kind": "full", "reference_ablation": "shuffled"}}, "needs our own loop"),
        ({"exposure": {"kind": "aligned"}}, "needs our own loop"),
        ({"exposure": {"kind": "bandit"}, "credit": {**CREDIT, "hold_updates": 3}}, "no multiple of 2"),
        ({"exposure": {"kind": "random", "granularity": "per_problem"}}, "2 processes"),
        ({}, "exposure: missing"),
        (["bandit"], "expected a mapping"),
    ],
)
def test_a_setting_that_cannot_act_here_is_refused(settings: dict[str, Any], says: str):
    measurable = frozenset({"train_kl", "train_success"})
    with pytest.raises(ConfigError, match=says):
        bridge_config(settings, FACTS, trainer="some-trainer", measurable=measurable, updates_per_batch=2, processes=2)


def test_what_a_trainer_measures_has_a_name_that_exposures_know():
    with pytest.raises(ConfigError, match=r"probe_sucess, which no exposure knows; allowed are train_success"):
        bridge_config({"exposure": {"kind": "full"}}, FACTS, trainer="x", measurable=frozenset({"probe_sucess"}))


def test_what_a_measure_gives_is_a_number():
    measure = {"probe_success": lambda: 1, "probe_kl": lambda: None}
    assert taken(measure, {"probe_success"}) == {"probe_success": 1.0}
    with pytest.raises(ConfigError, match="probe_kl gave None; expected a number"):
        taken(measure, {"probe_kl", "probe_success"})


def test_a_checkpoint_within_a_generation_batch_matters_where_ratios_change():
    credit = {**CREDIT, "hold_updates": 4, "lookahead_updates": 4}
    require_whole_batches(config("bandit", credit=credit), 4, 8, "save_steps")
    require_whole_batches(config("full"), 4, 6, "save_steps")
    with pytest.raises(ConfigError, match="save_steps: 6 is no multiple of 4"):
        require_whole_batches(config("bandit", credit=credit), 4, 6, "save_steps")


def test_a_generation_batch_serves_whole_updates():
    assert (updates_per_batch(4, 2), updates_per_batch(2, 4), updates_per_batch(3, 3)) == (2, 1, 1)
    with pytest.raises(ConfigError, match="contexts of two ratios"):
        updates_per_batch(4, 3)


def test_settings_may_stand_in_a_file(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("exposure: {kind: fixed, reveal_ratio: 0.5}\n")
    read = bridge_config(str(tmp_path / "mine.yaml"), FACTS, trainer="some-trainer", measurable=frozenset())
    assert Handle(read).ratio(0) == 0.5


def test_a_shuffled_replay_keeps_the_holds_of_the_recorded_run(tmp_path: Path):
    write_fake_run(tmp_path / "recorded", updates=UPDATES)  # learned, held for 4 updates
    exposure = {"kind": "replay", "replay_run": str(tmp_path / "recorded"), "replay_order": "shuffled"}
    handle = Handle(config(exposure=exposure))
    ratios = [handle.ratio(update) for update in range(UPDATES)]
    assert all(len(set(ratios[start : start + 4])) == 1 for start in range(0, UPDATES, 4))
    assert len(set(ratios)) == UPDATES // 4


def test_a_whole_view_is_the_reference_byte_for_byte():
    for reference in (REFERENCE, "no answer at all\n", "$x$ \\boxed{1}\n\n\n"):
        assert Handle(config("full")).view(problem_of("?", reference), 1.0).text == reference


def test_half_a_view_is_half_the_segments_a_note_and_the_answer():
    view = Handle(config("full")).view(PROBLEM, 0.5)
    note = "[The reference may be incomplete from here on.]"
    assert view.text == f"First 2 + 3 = 5.\n{note}\nFinal answer: \\boxed{{9}}"
    assert view.effective_ratio == 0.5


def test_no_answer_is_shown_where_none_is_known():
    assert "boxed" not in Handle(config("full")).view(problem_of("?", "one\n\ntwo\n\nthree"), 0.4).text
    assert Handle(config("full", views={"answer": "only"})).view(problem_of("?", "one\n\ntwo"), 0.5).text == ""


@pytest.mark.parametrize(
    ("context", "says"),
    [
        (7, "the reference is 7"),
        ({"reference": "x", "anwser": "1"}, "anwser"),
        ({"reference": "so \\boxed{3}", "answer": "4"}, "boxes '3' but its answer is '4'"),
        ("no box", "states? ?.*answer"),
        ("  \n", "row 1: the reference is empty"),
        ({"reference": "x", "answer": 9}, "row 1: answer 9, difficulty 0; expected text"),
        ({"reference": "x", "answer": "9", "difficulty": "hard"}, "difficulty 'hard'; expected .* a whole number"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(context: object, says: str):
    with pytest.raises(DataError, match=says):
        require_problems([("?", REFERENCE), ("??", context)], config())


def test_an_answer_that_only_algebra_could_tell_from_the_reference_is_no_contradiction():
    require_problems([("?", {"reference": "so \\boxed{\\sqrt{8}}", "answer": "2\\sqrt{2}"})], config())


@pytest.mark.parametrize("prompt", [[], 7, [{"role": "user"}]])
def test_a_prompt_that_is_neither_text_nor_chat_is_named(prompt: object):
    with pytest.raises(DataError, match="row 1: the prompt is"):
        require_problems([("?", REFERENCE), (prompt, REFERENCE)], config())


def test_a_column_that_a_row_does_not_have_is_named():
    rows = [{"prompt": "?", "context": "x"}, {"prompt": "?", "contxt": "x"}]
    assert list(columns(rows[:1], "prompt", "context")) == [("?", "x")]
    assert list(columns(rows, "prompt", optional="context")) == [("?", "x"), ("?", None)]
    with pytest.raises(DataError, match="row 1: no column context; it has prompt, contxt"):
        list(columns(rows, "prompt", "context"))


def test_the_problem_of_a_message_in_parts_is_its_texts():
    parts = [{"type": "text", "text": "2 + 3"}, {"type": "image"}, {"type": "text", "text": "+ 4?"}]
    assert message_text([{"role": "user", "content": parts}]) == PROBLEM.text


def test_the_problem_of_a_chat_is_what_the_user_says_last():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM.text}]
    assert problem_in(chat, {"reference": REFERENCE, "answer": "9", "difficulty": None}, "auto") == PROBLEM


def test_completions_are_judged_by_their_last_box():
    judge = Judge(config())
    problems = [problem_of("?", "\\boxed{9}", difficulty=3)] * 3
    judged = [right for *_, right in judge.verdicts(problems, ["9", "\\boxed{9}", "\\boxed{8}"])]
    judge.close()
    assert judged[-2:] == [1.0, 0.0]


def test_feedback_that_comes_late_and_out_of_order_teaches_the_same():
    prompt, late = Handle(config()), Handle(config(), max_delay=2)
    expected = play(prompt)
    ratios = []
    for block in range(0, UPDATES, 2):
        ratios += [late.ratio(block), late.ratio(block + 1)]
        assert late.observe(block + 1, told_of(late, block + 1)) == []
        assert [told.update for told in late.observe(block, told_of(late, block))] == [block, block + 1]
    assert ratios == expected
    assert late.state_dict() == prompt.state_dict()


def test_feedback_that_never_comes_is_counted_and_holds_nothing_up():
    handle = Handle(config(), max_delay=1)
    handle.ratio(0)
    assert handle.observe(1, told_of(handle, 1)) == []
    told = handle.observe(2, told_of(handle, 2))
    assert [(one.update, one.stats is None) for one in told] == [(0, True), (1, False), (2, False)]
    assert handle.lost == 1
    with pytest.raises(ValueError, match="observed before"):
        handle.observe(0, Feedback(1.0))
    with pytest.raises(ValueError, match="ask for the ratio of update 3"):
        handle.ratio(2)


def test_feedback_that_comes_twice_is_refused_while_it_waits_and_when_it_was_told():
    handle = Handle(config(), max_delay=2)
    handle.observe(1, told_of(handle, 1))
    with pytest.raises(ValueError, match="update 1 was observed before; awaited is update 0"):
        handle.observe(1, Feedback(1.0))
    handle.observe(0, told_of(handle, 0))
    with pytest.raises(ValueError, match="update 1 was observed before; awaited is update 2"):
        handle.observe(1, Feedback(1.0))


def test_a_view_that_is_trained_on_later_counts_where_it_is_noted():
    handle = Handle(config("fixed", exposure={"kind": "fixed", "reveal_ratio": 0.7}))
    ratio, view = handle.look(0, PROBLEM)
    handle.note(1, [(ratio, view.effective_ratio)])
    told = [handle.observe(update, Feedback(1.0))[0].stats for update in (0, 1)]
    assert [one and one.effective_ratio for one in told] == [0.7, 0.5]  # of the first no view is known


def test_a_measurement_of_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="probe_sucess is unknown"):
        Feedback(1.0, measured={"probe_sucess": 0.5})


def test_what_the_exposure_is_told_is_the_mean_of_the_views_that_were_shown():
    handle = Handle(config("fixed", exposure={"kind": "fixed", "reveal_ratio": 0.7}))
    handle.show(0, PROBLEM, updates=2)  # floor(.7 * 2) of 2 segments
    handle.show(0, problem_of("?", "\\boxed{1}"))  # no segment: nothing is withheld
    first, second = (handle.observe(update, Feedback(1.0))[0].stats for update in (0, 1))
    assert first is not None
    assert second is not None
    assert (first.reveal_ratio, first.effective_ratio) == (pytest.approx(0.7), 0.75)
    assert (second.reveal_ratio, second.effective_ratio) == (0.7, 0.5)


@pytest.mark.parametrize("kind", ["learned", "bandit"])
def test_threads_get_the_ratios_of_a_single_caller(kind: str):
    groups = {"exposure": {"kind": kind, "granularity": "per_problem"}} if kind == "learned" else {}
    alone, shared = Handle(config(kind, **groups)), Handle(config(kind, **groups))
    names = [f"p{i}" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: shared.ratio(0, name), names)) == [alone.ratio(0, name) for name in names]


@pytest.mark.parametrize("kind", ["fixed", "learned", "bandit"])
def test_a_pickled_handle_goes_on_as_the_one_it_was_made_of(kind: str):
    handle = Handle(config(kind))
    play(handle, last=UPDATES // 2)
    copied = pickle.loads(pickle.dumps(handle))
    assert play(copied, UPDATES // 2) == play(handle, UPDATES // 2)


@pytest.mark.parametrize("kind", ["fixed", "learned", "bandit"])
def test_a_saved_run_continues_as_if_it_had_not_been_cut(kind: str, tmp_path: Path):
    whole = recorded(kind, tmp_path / "whole")
    cut = tmp_path / "cut"
    recorded(kind, cut, saves={10: tmp_path / "there"}, stop=15)
    again, log = opened(kind, cut)
    log.resume(tmp_path / "there", 10)
    run_updates(again, log, 10, UPDATES)
    log.end("finished")
    for name in ("metrics", "decisions"):
        assert RunFolder.open(cut).rows(name) == RunFolder.open(whole).rows(name)
    assert len(RunFolder.open(cut).rows("metrics")) == UPDATES


def opened(kind: str, out: Path) -> tuple[Handle, Log]:
    handle = Handle(config(kind))
    return handle, Log(out, handle, trainer="some-trainer 1.0", fingerprint="b7d1c9")


def run_updates(handle: Handle, log: Log, first: int, last: int, saves: dict[int, Path] | None = None) -> None:
    for update in range(first, last):
        handle.show(update, PROBLEM)
        log.write(handle.observe(update, told_of(handle, update)))
        if saves and update + 1 in saves:
            log.save(saves[update + 1], update + 1)


def recorded(kind: str, out: Path, saves: dict[int, Path] | None = None, stop: int = UPDATES) -> Path:
    handle, log = opened(kind, out)
    log.begin()
    run_updates(handle, log, 0, stop, saves)
    if stop == UPDATES:
        for split in ("validation", "test"):
            graded = [Graded(f"p{i}", 0, sample, "correct", 5, False, False) for i in range(8) for sample in (0, 1)]
            log.evaluated(UPDATES, split, graded)
        log.end("finished")
    log.close()
    return out


def test_a_resume_without_its_state_or_into_another_run_is_refused(tmp_path: Path):
    recorded("bandit", tmp_path / "run", saves={10: tmp_path / "there"}, stop=12)
    with pytest.raises(CheckpointError, match=r"after 10 updates, found none"):
        opened("bandit", tmp_path / "run")[1].resume(tmp_path / "elsewhere", 10)
    with pytest.raises(CheckpointError, match=r"after 11 updates, found update-000010"):
        opened("bandit", tmp_path / "run")[1].resume(tmp_path / "there", 11)
    with pytest.raises(RunError, match="already holds a run"):
        opened("bandit", tmp_path / "run")[1].begin()


def test_a_later_log_of_this_process_takes_over_what_an_interrupted_one_holds(tmp_path: Path):
    handle, left = opened("bandit", tmp_path / "run")
    left.begin()
    run_updates(handle, left, 0, 12, {10: tmp_path / "there"})  # and then it was interrupted; nothing closed it
    again, log = opened("bandit", tmp_path / "run")
    log.resume(tmp_path / "there", 10)
    with pytest.raises(RunError, match="a later exposure of this process has resumed this run"):
        left.write([])
    run_updates(again, log, 10, UPDATES)
    left.close()
    with pytest.raises(RunError, match="in use by"), RunFolder.open(tmp_path / "run").lock():
        pass
    log.end("finished")
    assert len(RunFolder.open(tmp_path / "run").rows("metrics")) == UPDATES


def test_a_state_that_is_older_than_the_trainers_loses_the_updates_between(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    recorded("bandit", tmp_path / "run", saves={10: tmp_path / "there"}, stop=12)
    handle, log = opened("bandit", tmp_path / "run")
    log.resume(tmp_path / "there", 12, may_lose=2)
    run_updates(handle, log, 12, UPDATES)
    log.end("finished")
    rows = RunFolder.open(tmp_path / "run").rows("metrics")
    assert [row["update"] for row in rows if row["skipped"] == "its feedback never came"] == [10, 11]
    assert (handle.lost, len(rows)) == (2, UPDATES)
    assert "2 updates were lost: their feedback never came" in caplog.text


def test_decisions_without_a_reward_are_counted_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    handle, log = opened("bandit", tmp_path / "run")
    log.begin()
    for update in range(6):  # no rollout is graded: of three decisions, the windows of two close
        handle.show(update, PROBLEM)
        log.write(handle.observe(update, Feedback(1.0)))
    log.end("stopped")
    assert "2 exposure decisions were dropped without a reward: progress signal not measured" in caplog.text


def test_report_and_compare_read_the_run_of_another_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [recorded(kind, tmp_path / kind) for kind in ("fixed", "bandit")]
    page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert "that of some-trainer 1.0" in page  # in place of our loss, which says nothing of that run
    assert RunFolder.open(runs[0]).manifest["trainer"] == "some-trainer 1.0"
    print_comparison(runs[:1], runs[1:], as_json=True)
    assert json.loads(capsys.readouterr().out)
