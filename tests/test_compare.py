"""`atesd compare` and the tables behind it: what is selected on what, what is refused, and what is said."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from atesd import cli
from atesd.errors import RunError
from atesd.runs import RunFolder
from atesd_lab.cli.comparison import answer_first, print_rich
from atesd_lab.report.groups import common_updates, group_of, selections
from atesd_lab.report.honest import Report, compare_groups, comparison_table, markdown, results_table
from atesd_lab.stats.contrast import Contrast, paired
from atesd_lab.stats.differences import paired_difference
from atesd_lab.stats.selection import halves_of
from atesd_lab.sweep.grid import comparisons
from atesd_lab.sweep.jobs import Job
from atesd_lab.sweep.plan import Cell
from fake_run import begin_run, evaluation_row, fake_config, write_fake_run

Counts = dict[str, int]
UPDATES = 60


def counts_of(correct: int, problems: int = 40, samples: int = 2, shift: int = 0) -> Counts:
    """`correct` right samples, as even as they come, beginning at the problem `shift`."""
    each, rest = divmod(correct, problems)
    return {f"p{(i + shift) % problems}": min(samples, each + (i < rest)) for i in range(problems)}


def write_run(
    path: Path, scores: dict[tuple[str, int], Counts], seed: int = 0, kind: str = "full", status: str = "finished"
) -> Path:
    """A run with these correct counts by (split, update)."""
    run = begin_run(path, fake_config(UPDATES, seed, kind))
    for (split, update), counts in scores.items():
        row = evaluation_row(update, 0.5, np.random.default_rng(0), split)
        value = sum(counts.values()) / (2 * len(counts))
        average = {"value": value, "low": value, "high": value}
        run.append("evaluations", row | {"correct_counts": counts, "average": average, "problems": len(counts)})
    if status != "running":
        run.end_session(status)
    return path


def write_arm(folder: Path, name: str, lasts: list[int], kind: str = "full") -> list[Path]:
    """One run per seed with this many correct test samples (of 80) at the end, and a peak on validation at 40."""
    return [
        write_run(
            folder / f"{name}-{seed}",
            {
                ("validation", 20): counts_of(40, shift=seed),
                ("validation", 40): counts_of(60, shift=seed),
                ("validation", 60): counts_of(50, shift=seed),
                ("test", 0): counts_of(30),
                ("test", 60): counts_of(last, shift=7 * seed),
            },
            seed,
            kind,
        )
        for seed, last in enumerate(lasts)
    ]


def compared(a: list[Path], b: list[Path]) -> Report:
    return compare_groups(group_of("baseline", a), group_of("candidate", b))


@pytest.fixture
def arms(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    return write_arm(tmp_path, "a", [40, 42, 44]), write_arm(tmp_path, "b", [52, 53, 56])


def test_the_last_checkpoint_is_compared_on_test_and_paired_by_seed(arms: tuple[list[Path], list[Path]]):
    last = compared(*arms).comparisons[0]
    assert (last.rule, last.split, last.paired, last.contrast.covers_seeds) == ("fixed last", "test", True, True)
    # By hand: 126, then 161 correct of 240.
    assert (last.baseline, last.candidate) == pytest.approx((126 / 240, 161 / 240))
    assert last.contrast.value == pytest.approx(35 / 240)
    shares = [
        np.array([[run[f"p{i}"] / 2 for i in sorted(range(40), key=str)] for run in side])
        for side in ([counts_of(n, shift=7 * s) for s, n in enumerate(lasts)] for lasts in ([40, 42, 44], [52, 53, 56]))
    ]
    found = paired_difference(*shares)
    assert (last.contrast.low, last.contrast.high) == pytest.approx((found.low, found.high))


def test_a_checkpoint_chosen_on_validation_is_scored_on_test_where_test_was_evaluated_there(tmp_path: Path):
    a, b = (
        [
            write_run(
                tmp_path / f"{n}{s}",
                {
                    ("validation", 20): counts_of(70),
                    ("validation", 60): counts_of(40),
                    ("test", 20): counts_of(44),
                    ("test", 60): counts_of(60),
                },
                s,
            )
            for s in range(3)
        ]
        for n in "ab"
    )
    best = compared(a, b).comparisons[1]
    assert best.split == "test"
    assert "update 20, chosen on validation, scored on test" in best.rule
    assert best.baseline == pytest.approx(44 / 80)


def test_where_test_was_evaluated_at_the_ends_only_half_of_validation_scores_what_the_other_chose(
    arms: tuple[list[Path], list[Path]],
):
    report = compared(*arms)
    best = report.comparisons[1]
    assert best.split == "validation"
    assert best.short == "best common @40/40 (validation halves)"
    assert best.baseline == pytest.approx(60 / 80)
    assert any("Test was evaluated at the ends only" in note for note in report.notes)


def test_one_update_is_common_to_both_groups_and_never_the_first(arms: tuple[list[Path], list[Path]]):
    a, b = arms
    extra = RunFolder.open(a[0])
    extra.append("evaluations", evaluation_row(0, 0.99, np.random.default_rng(0)))
    extra.append("evaluations", evaluation_row(30, 0.99, np.random.default_rng(0)))
    groups = [group_of("a", a), group_of("b", b)]
    assert common_updates(groups) == [20, 40, 60]


def test_the_answer_is_read_before_the_table_and_once(arms: tuple[list[Path], list[Path]]):
    report = compared(*arms)
    answer, table = answer_first(report)
    assert answer.startswith("Fixed last: ")
    assert (answer, *table.notes) == comparison_table(report).notes


def test_a_peak_is_labelled_too_high_and_gets_no_verdict(arms: tuple[list[Path], list[Path]]):
    table = comparison_table(compared(*arms))
    peak = next(row for row in table.rows if "too high" in row[0])
    assert peak[-1] == "none: selected on itself"


def test_the_peak_of_noise_is_high_and_its_cross_fitted_score_is_not(tmp_path: Path):
    rng = np.random.default_rng(5)
    noise = {("validation", u): {f"p{i}": int(rng.binomial(2, 0.5)) for i in range(400)} for u in range(5, 65, 5)}
    groups = []
    for name in "ab":
        path = write_run(tmp_path / name, {**noise, ("test", 60): counts_of(40)})
        groups.append(group_of(name, [path]))
    last, _, fair, peak = selections(groups)
    assert last.split == "test"
    assert peak.shares["a"].mean() == max(sum(counts.values()) / 800 for counts in noise.values())
    assert fair.shares["a"].mean() < peak.shares["a"].mean()
    assert not peak.honest


def test_the_halves_depend_on_the_number_of_problems_alone_and_are_even():
    assert halves_of(41).tolist() == halves_of(41).tolist()
    assert sorted(np.bincount(halves_of(41))) == [20, 21]


def test_no_difference_is_not_distinguishable_and_says_what_would_settle_it(tmp_path: Path):
    one = compared(write_arm(tmp_path, "a", [40, 42, 44]), write_arm(tmp_path, "b", [43, 40, 44])).comparisons[0]
    assert one.contrast.verdict == "not distinguishable"
    assert one.verdict.startswith("not distinguishable: +0.4 points [")
    assert f"to settle 1.0 point takes about {one.settles_point.seeds} seeds of these 40 problems x 2" in one.verdict
    assert one.settles_observed.seeds is None or one.settles_observed.seeds > one.settles_point.seeds


def test_a_clear_difference_is_said_in_words_and_its_sign_follows_the_order(arms: tuple[list[Path], list[Path]]):
    a, b = arms
    assert compared(a, b).comparisons[0].verdict.startswith("candidate is better than baseline by 14.6 points [+")
    assert compared(b, a).comparisons[0].verdict.startswith("candidate is worse than baseline by 14.6 points [-")


def test_other_seeds_are_not_paired_and_that_is_said(arms: tuple[list[Path], list[Path]]):
    report = compared(arms[0], arms[1][:2])
    assert not report.comparisons[0].paired
    assert report.notes[0].startswith("Not paired: baseline has seeds 0, 1, 2, candidate seeds 0, 1.")


def test_two_sides_whose_folders_have_the_same_names_are_two_sides(tmp_path: Path):
    (a,), (b,) = (write_arm(tmp_path / side, "run", [last]) for side, last in (("a", 40), ("b", 52)))
    assert a.name == b.name
    assert compared([a], [b]).comparisons[0].contrast.value == pytest.approx(12 / 80)


def test_where_every_problem_gives_the_same_difference_nothing_is_distinguished(tmp_path: Path):
    a, b = write_arm(tmp_path, "a", [0, 0]), write_arm(tmp_path, "b", [80, 80])
    report = compared(a, b)
    last = report.comparisons[0]
    assert (last.contrast.low, last.contrast.high) == (1.0, 1.0)
    assert "has no width" in last.verdict
    assert [row[-1] for row in comparison_table(report).rows][-1] == "not distinguishable"


def test_equal_differences_have_no_width_whatever_rounding_makes_of_them():
    base = np.tile(np.arange(7) / 21, (3, 1))
    found = paired("gap", base, base + 1 / 3)
    assert found.low < found.high  # by the last bits
    assert (found.has_width, found.verdict) == (False, "not distinguishable")
    assert Contrast("gap", 2e-6, 1e-6, 3e-6).verdict == "above"
    assert Contrast("gap", 0.1, -math.inf, math.inf).has_width


def test_one_seed_a_side_says_nothing_of_another_seed(arms: tuple[list[Path], list[Path]]):
    report = compared(arms[0][:1], arms[1][:1])
    assert not report.comparisons[0].contrast.covers_seeds
    assert "not of another seed" in report.comparisons[0].verdict
    assert any("says nothing of another seed" in note for note in report.notes)


def change_last_row(path: Path, **changes: object) -> None:
    run = RunFolder.open(path)
    rows = [row for row in run.rows("evaluations") if (row["split"], row["update"]) == ("test", 60)]
    run.append("evaluations", rows[-1] | changes)


def test_another_number_of_samples_is_compared_and_told(arms: tuple[list[Path], list[Path]]):
    for path in arms[1]:
        change_last_row(path, samples=4, correct_counts=counts_of(100, samples=4))
    report = compared(*arms)
    assert report.comparisons[0].samples == (2, 4)
    assert report.comparisons[0].candidate == pytest.approx(100 / 160)
    assert any("different numbers of samples" in note for note in report.notes)


SAMPLER = {"temperature": 0.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "completion_tokens": 40, "seed": 0}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _, b: change_last_row(b[0], sampler=SAMPLER), "a-0 and b-0 were evaluated with different samplers"),
        (lambda _, b: change_last_row(b[0], correct_counts={"q": 1, "r": 2}), "different test problems"),
        (lambda _, b: change_last_row(b[0], samples=4), "candidate: 2 and 4 samples per test problem"),
        (lambda _, b: b.append(b[0]), "candidate: seed 0 occurs twice"),
        (lambda a, b: b.__setitem__(0, a[0]), "a-0 is on both sides"),
        (lambda _, b: b.clear(), "no run folder for candidate"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arms: tuple[list[Path], list[Path]], spoil: Callable[[list[Path], list[Path]], object], message: str
):
    spoil(*arms)
    with pytest.raises(RunError, match=message):
        compared(*arms)


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_an_unfinished_run_is_refused(tmp_path: Path, status: str):
    path = write_run(tmp_path / "r", {("test", 60): counts_of(40)}, status=status)
    with pytest.raises(RunError, match=f"r is {status}; let `atesd train` finish it"):
        group_of("a", [path])


def test_a_run_without_its_last_evaluation_is_refused(tmp_path: Path):
    path = write_run(tmp_path / "r", {("validation", 40): counts_of(40)})
    with pytest.raises(RunError, match="no evaluation after its last update, 60"):
        group_of("a", [path])


def test_runs_that_hold_out_nothing_are_compared_on_the_files_that_all_were_evaluated_on(tmp_path: Path):
    first, second = ("aime.jsonl", 60), ("math.jsonl", 60)
    a = write_run(tmp_path / "a", {first: counts_of(40), second: counts_of(20)}, seed=0)
    b = write_run(
        tmp_path / "b", {first: counts_of(60), second: counts_of(20), ("own.jsonl", 60): counts_of(9)}, seed=0
    )
    report = compare_groups(group_of("a", [a]), group_of("b", [b]))
    assert [one.short for one in report.comparisons] == ["last (aime.jsonl)", "last (math.jsonl)"]
    assert [100 * one.contrast.value for one in report.comparisons] == pytest.approx([25.0, 0.0])
    assert any(note.startswith("No checkpoint to select") for note in report.notes)


def test_a_file_is_scored_beside_the_test_problems_and_files_that_no_two_runs_share_are_refused(tmp_path: Path):
    scores = {("test", 60): counts_of(40), ("aime.jsonl", 60): counts_of(40)}
    both = [group_of(name, [write_run(tmp_path / name, scores)]) for name in ("a", "b")]
    assert [one.split for one in selections(both)] == ["test", "aime.jsonl"]
    apart = [group_of(name, [write_run(tmp_path / name, {(name, 60): counts_of(40)})]) for name in ("c", "d")]
    with pytest.raises(RunError, match=r"run `atesd evaluate RUN` for each, with --data FILE.jsonl"):
        selections(apart)


def test_a_file_of_the_same_name_with_other_answers_or_another_checker_is_not_compared(tmp_path: Path):
    contents = [("0" * 64, "math"), ("1" * 64, "math"), ("0" * 64, "exact"), None, ("0" * 64, "math")]
    runs = []
    for place, content in enumerate(contents):
        run = begin_run(tmp_path / f"run-{place}", fake_config(UPDATES))
        told = {} if content is None else {"content": dict(zip(("sha256", "checker"), content, strict=True))}
        run.append("evaluations", evaluation_row(UPDATES, 0.5, np.random.default_rng(0), "new.jsonl") | told)
        run.end_session("finished")
        runs.append(run.path)
    for other in runs[1:3]:
        with pytest.raises(RunError, match=r"run-0 and run-\d were scored on other contents of new.jsonl: 0000"):
            compared(runs[:1], [other])
    note = "Not every evaluation says which content of new.jsonl it was made on."
    assert note in compared(runs[:1], runs[3:4]).notes  # of an earlier version
    assert note not in compared(runs[:1], runs[4:]).notes


def test_a_single_evaluated_problem_gives_no_interval_and_is_refused(tmp_path: Path):
    runs = [write_run(tmp_path / name, {("test", UPDATES): {"p0": 1}}) for name in "ab"]
    with pytest.raises(RunError, match="test: 1 evaluated problem; an interval needs at least two"):
        compared(runs[:1], runs[1:])


def test_other_training_data_with_the_same_problems_is_told_and_not_paired(arms: tuple[list[Path], list[Path]]):
    for path in arms[1]:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"data_fingerprint": "other"}))
    report = compared(*arms)
    assert not report.comparisons[0].paired
    assert any("fingerprints differ" in note for note in report.notes)


def test_runs_that_differ_in_more_than_the_seed_are_told(tmp_path: Path):
    a = [*write_arm(tmp_path, "a", [40]), write_arm(tmp_path, "c", [40, 41], kind="random")[1]]
    report = compared(a, write_arm(tmp_path, "b", [42, 43]))
    assert any(note.startswith("baseline: its runs differ in more than the seed") for note in report.notes)


def test_a_table_of_arms_has_the_three_selections_differences_and_the_papers_number(tmp_path: Path):
    lasts = {"full": [40, 42, 44], "learned": [52, 53, 56], "single": [41]}
    groups = {name: group_of(name, write_arm(tmp_path, name, n)) for name, n in lasts.items()}
    table = results_table(groups, "full", paper={"full": "61.7", "learned": "62.6"})
    assert table.columns[:3] == ("arm", "paper", "seeds")
    assert [column.partition(" (")[0] for column in table.columns[3:7]] == [
        "peak",
        "peak",
        "best common @40/40",
        "last",
    ]
    rows = {row[0]: row for row in table.rows}
    assert rows["full"][1:3] == ("61.7", "3")
    assert rows["single"][1:3] == ("–", "1")
    assert rows["full"][-1] == "–"
    assert rows["learned"][-1] == "better"
    assert rows["learned"][-3].startswith("+14.6 [")
    assert "Paired by seed: seeds 0, 1, 2." in table.notes


def cells_with(arms: dict[str, list[Path]]) -> list[Cell]:
    jobs = {name: [Job(str(path / "config.yaml"), (), path) for path in paths] for name, paths in arms.items()}
    return [Cell(name, {"arm": name}, seed, job) for name, some in jobs.items() for seed, job in enumerate(some)]


def test_a_sweep_compares_its_groups_with_the_first_or_says_why_not(arms: tuple[list[Path], list[Path]]):
    cells = cells_with({"full": arms[0], "learned": arms[1]})
    (text,) = comparisons(cells)
    assert text.startswith("Average@k in %, against full\n")
    assert text.count("better") == 1
    change_last_row(arms[1][0], sampler=SAMPLER)
    assert next(comparisons(cells)).startswith(
        "full, learned are not compared: a-0 and b-0 were evaluated with different"
    )


def test_a_baseline_that_is_no_arm_is_named(tmp_path: Path):
    groups = {"full": group_of("full", write_arm(tmp_path, "a", [40]))}
    with pytest.raises(RunError, match="'fulll' is none of the arms: full"):
        results_table(groups, "fulll")


def run_cli(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["atesd", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_reads_two_sides_and_flags_after_them(
    arms: tuple[list[Path], list[Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    a, b = ([str(path) for path in side] for side in arms)
    assert run_cli(monkeypatch, "compare", *a, "--", *b, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["comparisons"][0]["difference"] == pytest.approx(35 / 240)
    candidates = [word for run in b for word in ("--candidate", run)]
    assert run_cli(monkeypatch, "compare", "--json", *a, *candidates) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert run_cli(monkeypatch, "compare", *a, "--", *b, "--markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| checkpoint | baseline | candidate |")
    assert {line.count("|") for line in lines[2:8]} == {7}
    assert run_cli(monkeypatch, "compare", *a, "--", *b) == 0
    assert "better than baseline by 14.6 points" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("{0}",), ("{0}", "--"), ("{0}", "--", "{1}", "--json", "--markdown")])
def test_a_missing_side_or_two_formats_are_bad_input(
    words: tuple[str, ...],
    arms: tuple[list[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    filled = [word.format(arms[0][0], arms[1][0]) for word in words]
    assert run_cli(monkeypatch, "compare", *filled) == 2
    assert capsys.readouterr().err.startswith("error: compare: ")


def test_the_terminal_shows_the_same_words_and_no_markup_of_names(arms: tuple[list[Path], list[Path]]):
    report = compare_groups(group_of("[red]a[/red]", arms[0]), group_of("b", arms[1]))
    stream = io.StringIO()
    print_rich(report, Console(file=stream, width=200))
    assert "[red]a[/red]" in stream.getvalue()
    for row in comparison_table(report).rows:
        assert all(cell in stream.getvalue() for cell in row)


def test_a_bar_in_a_name_stays_in_its_markdown_cell(arms: tuple[list[Path], list[Path]]):
    report = compare_groups(group_of("a|b", arms[0]), group_of("c", arms[1]))
    assert "| a\\|b |" in markdown(comparison_table(report))


def test_runs_with_different_lengths_are_told(tmp_path: Path):
    a = write_fake_run(tmp_path / "a", updates=60)
    b = write_fake_run(tmp_path / "b", updates=40)
    assert any("end at different updates" in note for note in compared([a.path], [b.path]).notes)
