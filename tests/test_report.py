from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.config import config_from_mapping, method_name
from atesd.errors import RunError
from atesd.runs import RunFolder
from atesd.text import duration, number, percent, percent_interval, points_interval, visible
from atesd_lab.report.alarms import find_alarms
from atesd_lab.report.page import Lead, content_policy, facts_table, render_page, status, write_report
from atesd_lab.report.rows import RunRows, natural, read_run, read_runs
from atesd_lab.report.samples import KL_LEVELS, sample_views, teacher_only, token_level
from atesd_lab.report.worlds import worlds_of
from fake_run import begin_run, evaluation_row, fake_config, metric_row, sample_row, write_fake_run
from outline import Outline

NOISE = np.random.default_rng(0)
ATTACK = (
    "<script>alert(1)</script><img src=x onerror=alert(1)></style></title>]]>--><svg/onload=alert(1)>"
    '" onmouseover="alert(1)" x="{{ 7 * 7 }}&lt;\u202egnirts\u202c\u2066\u200b\x00\x1b\r\ud800'
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A learned run whose model and data try to break out of the page, and one that has only begun."""
    folder = tmp_path_factory.mktemp("runs")
    run = write_fake_run(folder / "learned<b>", model={"system_prompt": ATTACK.replace("\ud800", "")})
    pieces = [ATTACK[start : start + 7] for start in range(0, len(ATTACK), 7)]
    measured = [float(place - 9) for place in range(len(pieces))]
    texts = {"completion": ATTACK, "student_context": ATTACK, "teacher_context": ATTACK + ATTACK, "problem_id": ATTACK}
    values = {"token_alignment": measured, "token_ratio": [0.5]}
    run.append("samples", sample_row(60, pieces, NOISE, verdict="wrong", **texts, **values))
    run.append("metrics", metric_row(60, 0.5, NOISE, skipped=ATTACK))
    begin_run(folder / "begun", fake_config(10)).append("evaluations", evaluation_row(0, 0.5, NOISE))
    return [folder / "learned<b>", folder / "begun"]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(runs, tmp_path_factory.mktemp("out") / "deep" / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def rows_of(path: Path, **changes: object) -> RunRows:
    """An empty run with the given rows."""
    begin_run(path, fake_config(100))
    run = read_run(path)
    fields = {name: getattr(run, name) for name in RunRows.__slots__}
    return RunRows(**fields | changes)


def test_every_element_of_the_page_nests_and_closes(outline: Outline):
    assert outline.faults == []


def test_no_id_occurs_twice_and_every_reference_has_its_target(page: str, outline: Outline):
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([^")]+)', page)
    labels = [attributes["aria-labelledby"] for _, attributes in outline.elements if "aria-labelledby" in attributes]
    assert {*references, *labels} <= set(ids)


def test_hostile_text_adds_no_element_and_no_event_handler(outline: Outline):
    tags = {tag for tag, _ in outline.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base", "link", "b"}
    assert not [name for _, attributes in outline.elements for name in attributes if name.startswith("on")]


def test_hostile_text_is_shown_as_text(outline: Outline):
    text = "".join(outline.text)
    assert text.count("<script>alert(1)</script>") >= 4  # three contexts and the tokens, at least
    assert "{{ 7 * 7 }}&lt;" in text
    assert "learned<b>" in text


def test_marks_that_reorder_or_hide_text_are_written_out(page: str, outline: Outline):
    assert not [mark for mark in page if unicodedata.category(mark) in ("Cc", "Cf", "Cs") and mark != "\n"]
    text = "".join(outline.text)
    for code in ("202E", "202C", "2066", "200B", "0000", "001B", "000D", "D800"):
        assert f"⟦U+{code}⟧" in text


def test_the_policy_forbids_everything_but_the_page_s_own_style(page: str, outline: Outline):
    policies = [meta for meta in outline.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert [meta["content"] for meta in policies] == [
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_no_style_attribute_needs_an_exception_from_the_policy(outline: Outline):
    assert not [tag for tag, attributes in outline.elements if "style" in attributes]
    assert len(outline.named("style")) == 1
    assert content_policy("a") != content_policy("b")


def test_nothing_is_fetched_from_anywhere(page: str, outline: Outline):
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    for _, attributes in outline.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))


def test_the_page_has_a_language_a_title_and_a_name_for_every_figure(outline: Outline):
    assert outline.named("html") == [{"lang": "en"}]
    assert [tag for tag, _ in outline.elements].count("h1") == 1
    charts = outline.named("svg")
    assert len(charts) > 30
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)


def test_every_section_is_there_for_every_run(outline: Outline):
    text = " ".join(outline.text)
    for heading in ("Results", "Comparison", "Exposure", "Credit", "State signals", "Health", "Time", "Samples"):
        assert heading in text
    assert "selected on the same data" in text
    assert text.count("The whole resolved config") == 2


def test_the_same_folders_give_the_same_bytes_in_another_process(runs: list[Path], page: str, tmp_path: Path):
    code = "import sys; from pathlib import Path; from atesd_lab.report.page import write_report\n"
    code += "out, *runs = map(Path, sys.argv[1:]); write_report(runs, out); print('torch' in sys.modules)"
    arguments = [str(tmp_path / "page.html"), *map(str, runs)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert (tmp_path / "page.html").read_text("utf-8") == page
    assert done.stdout == "False\n"  # the report never imports torch


def test_a_run_without_rows_gives_a_page_that_says_so(tmp_path: Path):
    begin_run(tmp_path / "new", fake_config(10))
    page = write_report([tmp_path / "new"], tmp_path / "new" / "report.html").read_text("utf-8")
    assert Outline(page).faults == []
    for words in ("No evaluations yet", "No updates yet", "No samples were logged yet", "0 of 10 updates"):
        assert words in page


def test_a_run_that_is_still_being_written_gives_a_page(tmp_path: Path):
    run = begin_run(tmp_path / "going", fake_config(10))
    run.append("metrics", metric_row(0, 0.5, NOISE))
    run.append("evaluations", evaluation_row(0, 0.5, NOISE))
    with (tmp_path / "going" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 1, "lo')
    page = render_page(read_runs([tmp_path / "going"]))
    assert "running, or killed: 1 of 10 updates" in page
    assert Outline(page).faults == []


def test_a_baseline_without_teacher_has_no_exposure(tmp_path: Path):
    run = begin_run(tmp_path / "sft", fake_config(10, train={"method": "sft", "num_updates": 10}))
    absent = ("kl", "reveal_ratio", "effective_ratio", "top1_disagreement", "teacher_entropy", "clipped_share")
    for update in range(3):
        run.append("metrics", metric_row(update, 0.5, NOISE, **dict.fromkeys(absent)))
    run.append("samples", sample_row(0, ["a", "b"], NOISE, teacher_context="", token_kl=[], verdict=None))
    page = render_page(read_runs([tmp_path / "sft"]))
    assert "This method has no teacher" in page
    assert "not checked" in page
    assert ">SFT<" in page


def test_what_is_no_run_folder_is_refused_by_name(tmp_path: Path):
    with pytest.raises(RunError, match="no run folder given"):
        read_runs([])
    with pytest.raises(RunError, match="nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path):
    for parent in ("a", "b"):
        begin_run(tmp_path / parent / "micro", fake_config(10))
    runs = read_runs([tmp_path / "a" / "micro", tmp_path / "b" / "micro"])
    assert [run.name for run in runs] == ["a/micro", "b/micro"]


def test_a_decision_logged_as_pending_and_again_as_finished_counts_once(tmp_path: Path):
    run = write_fake_run(tmp_path / "run", updates=8)
    (pending,) = [row for row in run.rows("decisions") if row["status"] == "pending"]
    run.append("decisions", pending | {"status": "finished", "reward": 0.5})
    newest = read_run(tmp_path / "run").decisions
    assert [row["update"] for row in newest] == [0, 4]
    assert newest[-1]["reward"] == 0.5


@pytest.mark.parametrize(
    ("groups", "name"),
    [
        ({"exposure": {"kind": "full"}}, "OPSD (full exposure)"),
        ({"exposure": {"kind": "fixed", "reveal_ratio": 0.25}}, "fixed ratio 0.25"),
        ({"credit": {"preset": "paper", "shuffle_rewards": True}}, "ATESD (paper credit), shuffled rewards"),
        ({"exposure": {"kind": "full", "reference_ablation": "filler"}}, "OPSD (full exposure), control: filler"),
        ({"train": {"method": "grpo", "batch_size": 16}}, "GRPO"),
    ],
)
def test_a_method_is_named_as_the_papers_name_it(groups: dict[str, object], name: str):
    assert method_name(config_from_mapping(groups)) == name


def test_the_status_says_how_far_a_run_came(tmp_path: Path):
    assert status(rows_of(tmp_path / "a")) == "running, or killed: 0 of 100 updates"
    manifest = {"status": "stopped"}
    metrics = ({"update": 4},)
    assert status(rows_of(tmp_path / "b", manifest=manifest, metrics=metrics)) == "stopped early: 5 of 100 updates"


@given(st.text(st.characters(codec=None)))
def test_visible_text_hides_nothing_and_can_be_written(text: str):
    shown = visible(text)
    assert not [mark for mark in shown if unicodedata.category(mark) in ("Cc", "Cf", "Cs", "Zl") and mark not in "\n\t"]
    shown.encode()
    assert visible(shown) == shown


@pytest.mark.parametrize("mark", ["\u202e", "\u2066", "\u200d", "\u00ad", "\ufeff", "\u3164", "\ufe0f", "\U000e0041"])
def test_marks_without_a_shape_are_written_out(mark: str):
    assert visible(f"a{mark}b") == f"a⟦U+{ord(mark):04X}⟧b"


def test_ordinary_text_of_any_script_stays_as_it_is():
    text = "x² + y² = 1, \\boxed{7}\n\tπ ≈ 3.14 Ελληνικά עברית 数学 ⟦"
    assert visible(text) == text


def test_numbers_carry_what_they_can_bear():
    assert [number(value) for value in (0.12345, 12.345, 1234.5, 0.0, 7, 5e-6)] == [
        "0.123",
        "12.3",
        "1234",
        "0.00",
        "7",
        "5.00e-06",
    ]
    assert number(None) == number(float("nan")) == percent(None) == "–"
    assert percent_interval({"value": 0.7126, "low": 0.66, "high": 0.765}) == "71.3 [66, 76]"
    assert percent_interval({"value": 0.5, "low": None, "high": None}) == "50.0"
    assert points_interval(0.12, -0.004, 0.2) == "+12.0 [-0.4, +20.0]"
    assert [duration(s) for s in (8.25, 59.96, 185, 7620)] == ["8.2 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]


def test_difficulties_sort_by_their_number():
    assert sorted(["10", "2", "1", "level 3"], key=natural) == ["1", "2", "10", "level 3"]


def test_a_token_s_shade_counts_the_levels_that_its_kl_reaches():
    assert [token_level(kl) for kl in (-1e-9, 0.0, 0.01, 0.5, 99.0)] == [0, 0, 1, 4, len(KL_LEVELS)]


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=12))
def test_the_parts_of_the_teacher_s_context_join_to_the_whole(student: str, teacher: str):
    before, added, after = teacher_only(student, teacher)
    assert before + added + after == teacher
    assert student.startswith(before)
    assert student.endswith(after)


def test_only_what_the_student_does_not_read_is_marked():
    student, teacher = "Problem: 1 + 1\n\nReason.", "Problem: 1 + 1\n\nReference: 2\n\nReason."
    assert teacher_only(student, teacher) == ("Problem: 1 + 1", "\n\nReference: 2", "\n\nReason.")


def test_tokens_without_a_measured_kl_say_so(tmp_path: Path):
    row = sample_row(0, ["a", "b", "c"], NOISE, token_kl=[2.0])
    (view,) = sample_views(rows_of(tmp_path / "run", samples=(row,)))
    (heat,) = view.heats
    assert [(token.style, token.words) for token in heat.tokens] == [
        ("k5", "2.0 nats"),
        ("k0", "not measured"),
        ("k0", "not measured"),
    ]


def test_many_samples_are_cut_to_the_first_and_the_last(tmp_path: Path):
    rows = tuple(sample_row(update, ["a"], NOISE) for update in range(20))
    views = sample_views(rows_of(tmp_path / "run", samples=rows))
    assert [int(view.heading.split()[1].rstrip(",")) for view in views] == [0, 1, 14, 15, 16, 17, 18, 19]


def metrics(key: str, values: list[float]) -> tuple[dict[str, object], ...]:
    return tuple({"update": update, key: value, "skipped": None} for update, value in enumerate(values))


@pytest.mark.parametrize(
    ("key", "values", "title"),
    [
        ("completion_tokens", [100.0] * 10 + [40.0] * 10, "Length collapse"),
        ("truncated_share", [0.02] * 10 + [0.2] * 10, "Truncation rising"),
        ("loop_share", [0.0] * 10 + [0.15] * 10, "Loops rising"),
        ("kl", [0.1] * 25 + [0.6] + [0.1] * 5, "KL spikes"),
        ("reveal_ratio", [0.5] * 10 + [0.99] * 10, "Exposure at its bound"),
    ],
)
def test_a_known_way_to_fail_raises_its_alarm_and_no_other(tmp_path: Path, key: str, values: list[float], title: str):
    run = rows_of(tmp_path / "run", metrics=metrics(key, values))
    assert [alarm.title for alarm in find_alarms(run)] == [title]
    steady = rows_of(tmp_path / "steady", metrics=metrics(key, [0.4] * len(values)))
    assert find_alarms(steady) == []


def test_a_failed_run_says_so_first_and_keeps_its_rows(tmp_path: Path):
    begin_run(tmp_path / "run", fake_config(10)).append("metrics", metric_row(0, 0.5, NOISE))
    RunFolder.open(tmp_path / "run").end_session("failed")
    run = read_run(tmp_path / "run")
    assert status(run) == "failed: 1 of 10 updates"
    assert find_alarms(run)[0].title == "Run failed"


def test_a_resumed_run_tells_what_had_changed(tmp_path: Path):
    run = begin_run(tmp_path / "run", fake_config(10))
    run.begin_session(fake_config(20), command=["atesd", "train"], updates_done=5)
    facts = dict(facts_table([read_run(tmp_path / "run")]).rows)
    assert facts["sessions"].startswith("2; train.num_updates: 10 -> 20")


def test_hashes_are_shortened_and_uncommitted_changes_are_not(tmp_path: Path):
    run = rows_of(tmp_path / "run", manifest={"commit": "0123456789abcdef+changes", "data_fingerprint": "f" * 64})
    facts = dict(facts_table([run]).rows)
    assert facts["commit"] == "0123456789ab+changes"
    assert facts["data"].endswith(" ffffffffffff")


def test_a_decline_after_the_peak_is_told_with_both_numbers(tmp_path: Path):
    evaluations = tuple(
        evaluation_row(update, 0.5, NOISE) | {"average": {"value": value, "low": 0.0, "high": 1.0}}
        for update, value in ((0, 0.4), (100, 0.7), (200, 0.6))
    )
    (alarm,) = find_alarms(rows_of(tmp_path / "run", evaluations=evaluations))
    assert alarm.title == "Decline after a peak"
    assert "70.0 % at update 100 to 60.0 % at update 200" in alarm.detail


def test_skipped_updates_and_unread_answers_are_told(tmp_path: Path):
    rows = ({"update": 0, "skipped": "loss is not finite"}, {"update": 1, "skipped": None})
    verdicts = {"correct": 5, "wrong": 3, "unparseable": 1, "timeout": 1}
    evaluation = evaluation_row(0, 0.5, NOISE) | {"verdicts": verdicts}
    alarms = find_alarms(rows_of(tmp_path / "run", metrics=rows, evaluations=(evaluation,)))
    assert [alarm.title for alarm in alarms] == ["Skipped updates", "Answers not read"]
    assert "1 update of 2 skipped: loss is not finite" in alarms[0].detail
    assert alarms[1].detail.startswith("20.0 %")  # 2 of 10


def of_world(path: Path, kind: str, leap_share: float) -> RunRows:
    data = {"source": "world", "leap_share": leap_share}
    begin_run(path, fake_config(100, kind=kind, data=data)).append("evaluations", evaluation_row(0, 0.5, NOISE, "test"))
    return read_run(path)


def test_runs_of_two_worlds_are_shown_apart_and_a_method_has_one_style_in_both(tmp_path: Path):
    runs = [of_world(tmp_path / f"{kind}-{q}", kind, q) for q in (0.0, 0.5) for kind in ("full", "learned")]
    steps, leaps = worlds_of([runs[0], runs[1], runs[3], runs[2]])
    assert (steps.name, leaps.name) == ("steps world", "leap world")
    assert dict(zip(steps.labels, steps.styles, strict=True)) == dict(zip(leaps.labels, leaps.styles, strict=True))
    assert steps.labels == ("OPSD (full exposure)", "ATESD (sound credit)")
    page = render_page(runs)
    assert page.count("<caption>steps world: Average@k on test, %") == 1
    assert page.count("<caption>leap world: Average@k on test, %") == 1
    assert "The runs use different data" not in page


def test_two_runs_of_one_method_in_a_world_keep_their_own_styles_and_names(tmp_path: Path):
    runs = [of_world(tmp_path / name, "full", q) for name, q in (("a", 0.0), ("b", 0.0), ("c", 0.5))]
    steps, leaps = worlds_of(runs)
    assert (steps.labels, steps.styles) == (("a", "b"), (0, 1))
    assert (leaps.labels, leaps.styles) == (("c",), (0,))


def test_runs_of_one_world_are_not_parted(tmp_path: Path):
    runs = [of_world(tmp_path / kind, kind, 0.5) for kind in ("full", "learned")]
    (world,) = worlds_of(runs)
    assert (world.name, world.labels, world.styles) == ("", ("full", "learned"), (0, 1))


def test_many_runs_are_counted_in_the_title_and_their_further_tables_are_folded(tmp_path: Path):
    runs = [of_world(tmp_path / f"{place}", "full", 0.5) for place in range(5)]
    page = render_page(runs)
    assert "<h1>5 runs</h1>" in page
    results, folded = page.index("Average@k on test"), page.index("Differences on test, points")
    assert results < page.index("more tables") < folded
    assert "more tables" not in render_page(runs[:2])


def test_a_lead_stands_first_with_its_commands(tmp_path: Path):
    lead = Lead("A <question>", ("One sentence.",), ("A note.",), (), (("atesd audit micro", "why"),))
    page = render_page([of_world(tmp_path / "a", "full", 0.5)], lead)
    assert "<h1>A &lt;question&gt;</h1>" in page
    assert page.index("One sentence.") < page.index("A note.") < page.index('id="results"')
    assert "<code>atesd audit micro</code>" in page


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["/home/me/.venv/bin/atesd", "train", "micro"], "atesd train micro"),
        (["/x/atesd_lab/cli/worker.py", "train", "micro", "--out", "a b"], "atesd train micro --out 'a b'"),
        (["train.py", "--lr", "1"], "train.py --lr 1"),
        ([], ""),
    ],
)
def test_a_command_is_shown_as_one_would_type_it(command: list[str], shown: str, tmp_path: Path):
    run = rows_of(tmp_path / "run", manifest={"command": command})
    assert dict(facts_table([run]).rows)["command"] == shown


def test_a_wide_table_says_on_a_phone_that_it_scrolls_and_its_score_stands_first(tmp_path: Path):
    page = render_page([of_world(tmp_path / "a", "full", 0.5)])
    card = page.partition('<table class="results">')[2].partition("</div>\n</div>")[0]
    assert card.index('<th scope="col">last</th>') < card.index('<th scope="col">method</th>')
    assert 'class="more"' in card
