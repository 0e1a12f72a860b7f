"""The benchmarks measure what they say, record it whole, and the document's tables come from the records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import checks, control, demo, gpu, lookahead, loss, prefix, rollout, step
from benchmarks.__main__ import checks_failed, main, run
from benchmarks.children import in_child, peak_here
from benchmarks.harness import Case, Goal, Result, Settings, in_turns, ratio, seconds_of, single
from benchmarks.models import TOY, random_model
from benchmarks.record import RESULTS, ROOT, instructions, machine, processor, provenance, read, write
from benchmarks.table import case_table, goals_table, records, section, update_docs

SMALL = Settings("small")


def burn(flops: float) -> None:
    a = torch.ones(256, 256)
    for _ in range(int(flops / (2 * 256**3))):
        a @ a


def test_ratio_of_known_work_is_that_of_the_work() -> None:
    # CPU time of twelve matrix products over that of four, in the same rounds.
    rounds = in_turns({"four": lambda: burn(2e9), "twelve": lambda: burn(6e9)}, 5, "cpu")
    assert ratio(rounds, "twelve", "four").median == pytest.approx(3, rel=0.3)


def test_ratios_are_taken_within_rounds() -> None:
    # By hand: the machine is ten times slower in the second round; the ratios are 2, 2, 3, their median is 2.
    rounds = [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 20.0}, {"a": 1.0, "b": 3.0}]
    found = ratio(rounds, "b", "a")
    assert (found.median, found.low, found.high) == (2, 2, 3)


def test_variants_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    rounds = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "cpu")
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert [list(row) for row in rounds] == [["a", "b"], ["a", "b"]]


def test_time_is_that_of_the_process_not_of_the_clock() -> None:
    import time

    assert seconds_of(lambda: time.sleep(0.05), "cpu") < 0.04


def test_the_peak_of_a_call_is_what_it_allocates() -> None:
    # 64 MiB are written and freed within the call.
    peak = peak_here(lambda: torch.ones(2**24).sum(), "cpu")
    assert peak == pytest.approx(2**26, rel=0.2)


@pytest.mark.parametrize(
    ("bound", "limit", "value", "verdict"),
    [
        ("at most", 0.5, 0.5, "met"),
        ("at most", 0.5, 0.6, "missed by 20%"),
        ("at most", 0.5, 0.502, "missed by 0.4%"),
        ("at least", 2.0, 2.5, "met"),
        ("at least", 2.0, 1.5, "missed by 25%"),
    ],
)
def test_a_verdict_says_by_how_much(bound: str, limit: float, value: float, verdict: str) -> None:
    goal = Goal("work", bound, limit, single(value))
    assert goal.verdict == verdict
    assert goal.is_met == (verdict == "met")


def result() -> Result:
    rounds = [{"floor": 1.0, "ours": 1.2}, {"floor": 2.0, "ours": 2.2}, {"floor": 1.0, "ours": 1.1}]
    case = Case("work", rounds, {"ours": 3_000_000}, {"ours": {"error": 1e-6}}, {"Liger": "not installed"})
    return Result("toy", [case], [Goal("work: time over floor", "at most", 1.15, ratio(rounds, "ours", "floor"))])


def test_a_result_is_read_back_as_written(tmp_path: Path) -> None:
    path = write(result(), SMALL, ["python", "-m", "benchmarks", "toy"], tmp_path)
    found, facts = read(path)
    assert found == Result(result().name, list(result().cases), list(result().goals))
    assert facts == json.loads(json.dumps(provenance(SMALL, ["python", "-m", "benchmarks", "toy"])))


def test_a_record_names_no_machine_and_no_path(tmp_path: Path) -> None:
    import getpass
    import platform

    text = write(result(), SMALL, ["python", "-m", "benchmarks"], tmp_path).read_text("utf-8")
    assert str(ROOT) not in text
    assert platform.node() not in text
    assert getpass.getuser() not in text.split('"')


def test_tables_hold_medians_ranges_memory_and_verdicts() -> None:
    # By hand: ours over floor is 1.2, 1.1, 1.1 (median 1.1); its median time 1.2 s.
    assert case_table(result().cases[0]).splitlines()[2:] == [
        "| floor | 1 s | 1.00 (1.00 to 1.00) |  |",
        "| ours | 1.2 s | 1.10 (1.10 to 1.20) | 3 MB |",
    ]
    assert goals_table(result().goals).splitlines()[2] == (
        "| work: time over floor | at most 1.15 x | 1.1 x (1.1 to 1.2) | met |"
    )


def test_the_document_is_filled_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    write(result(), Settings(), ["python", "-m", "benchmarks", "toy"], tmp_path / "here")
    docs = tmp_path / "performance.md"
    docs.write_text(
        "before\n<!-- begin toy -->\nold\n<!-- end toy -->\nbetween\n<!-- begin goals -->\n<!-- end goals -->\n"
    )
    assert update_docs(tmp_path, docs) == ["toy", "goals"]
    text = docs.read_text("utf-8")
    assert text.startswith("before\n<!-- begin toy -->\n**work**")
    assert "old" not in text
    assert "\n<!-- end toy -->\nbetween\n" in text
    assert "1.1 x (1.1 to 1.2): met |" in text
    update_docs(tmp_path, docs)
    assert docs.read_text("utf-8") == text


def test_machines_stand_side_by_side_in_one_row_per_goal_and_variant(tmp_path: Path) -> None:
    # By hand: on the second machine ours takes 1.0 of the floor's 1.0 in its one round, and the case has no memory.
    other = Result("toy", [Case("work", [{"floor": 1.0, "ours": 1.0}])], [Goal("new", "at most", 2, single(1.0), "")])
    write(result(), SMALL, ["x"], tmp_path / "first")
    write(other, SMALL, ["x"], tmp_path / "second")
    found = records(tmp_path)
    assert section("goals", found).splitlines()[2:] == [
        "| work: time over floor | at most 1.15 x | 1.1 x (1.1 to 1.2): met |  |",
        "| new | at most 2 |  | 1: met |",
    ]
    table = section("toy", found).splitlines()
    assert "| variant | first | second |" in table
    assert "| ours | 1.2 s; 1.10 (1.10 to 1.20); 3 MB | 1 s; 1.00 (1.00 to 1.00) |" in table
    assert "Not run on first: Liger (not installed)." in table
    assert [line.split("|")[1].strip() for line in section("machines", found).splitlines()[2:]] == ["first", "second"]


def test_what_was_only_reported_says_so_and_stands_in_the_rows_of_what_was_measured() -> None:
    found = records(RESULTS)
    assert "reported by hand: ratios only" in section("reported", found)
    (told,) = [r for r in section("machines", found).splitlines() if r.startswith("| intel-xeon-amx ")]
    assert told.endswith("| reported by hand: ratios only |")
    rows = [row.split(" | ") for row in section("goals", found).splitlines()]
    (row,) = [row for row in rows if "step, vocabulary 4,096" in row[0] and "time over TRL" in row[0]]
    assert row[2].startswith("0.756 x")
    assert row[-1] == "0.752 x: missed by 0.3% |"


def test_a_record_names_the_instructions_that_matrix_products_use() -> None:
    facts = provenance(SMALL, ["x"])
    told = Path("/proc/cpuinfo")
    if told.is_file():
        assert facts["instructions"] == instructions()
        assert set(facts["instructions"]) <= set(told.read_text("utf-8").split())
    assert facts["kernels"] == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize(
    ("name", "flags", "folder"),
    [
        ("AMD EPYC", "fpu avx2 avx512f avx512_bf16", "amd-epyc-avx512bf16"),
        ("Intel(R) Xeon(R) Platinum 8488C", "avx512f amx_tile amx_int8", "intel-xeon-platinum-8488c-amxint8"),
        ("Neoverse-V1", "asimd sve", "neoverse-v1-sve"),
    ],
)
def test_a_folder_is_named_after_the_processor(
    name: str, flags: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.record.cpuinfo", lambda key: {"model name": name, "flags": flags}.get(key))
    assert processor() == name
    assert machine(SMALL) == folder


def test_the_tables_in_the_repository_are_those_of_its_records() -> None:
    found = records(RESULTS)
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    names = {name for results in found.values() for name in results}
    for name in (*sorted(names), "goals", "machines"):
        assert f"<!-- begin {name} -->\n{section(name, found)}\n<!-- end {name} -->" in text, name


def test_the_peers_that_the_lock_installs_are_those_that_were_measured() -> None:
    lock = (ROOT / "requirements" / "lock.txt").read_text("utf-8").splitlines()
    assert {"trl==1.16.0", "liger-kernel==0.8.5"} <= set(lock)
    assert "liger-kernel==0.8.5" in (ROOT / "pyproject.toml").read_text("utf-8")


def test_hidden_states_are_as_far_apart_as_asked() -> None:
    x = loss.make_inputs(loss.Shape(256, 64, 512), kl=1e-2)
    assert float(loss.dense(x, "forward_kl")[0]) == pytest.approx(1e-2, rel=0.15)


def test_a_variant_that_computes_something_else_is_not_timed() -> None:
    x = loss.make_inputs(loss.Shape(8, 8, 32))
    half = {"half": lambda x, divergence: tuple(value / 2 for value in loss.dense(x, divergence))}
    with pytest.raises(ValueError, match="half: forward_kl is off"):
        loss.require_same(half, x, "forward_kl")


def test_a_child_imports_the_source_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "atesd").mkdir()
    (tmp_path / "atesd" / "__init__.py").write_text("raise ImportError('the other source')\n")
    with pytest.raises(RuntimeError, match="the other source"):
        in_child(demo.train_arms, tmp_path, overrides=[])


def test_loss_runs_end_to_end() -> None:
    found = loss.run(SMALL)
    assert {case.name.split(",")[0] for case in found.cases} == {"loss", "loss memory", "loss accuracy"}
    assert all(case.rounds[0]["dense"] > 0 for case in found.cases if case.rounds)


def test_bfloat16_gives_float32s_loss_and_gradient_with_either_attention() -> None:
    found = run("bfloat16", SMALL)
    passes, update, memory = found.cases
    assert len(passes.figures or {}) == 3
    for off in (passes.figures or {}).values():  # rounding to 8 bits, and no more
        assert 0 < off["loss off"] < 0.01
        assert 0 < off["gradient off"] < 0.1
    assert all(seconds > 0 for seconds in update.rounds[0].values())
    assert all(size > 1e8 for size in (memory.memory or {}).values())


@pytest.mark.parametrize(("name", "cases"), [("rollout", 1), ("rollout-smollm2", 2)])
def test_rollouts_run_end_to_end(name: str, cases: int) -> None:
    found = run(name, SMALL)
    assert (found.name, len(found.cases), len(found.goals)) == (name, cases, 2 * cases)
    for case in found.cases:
        assert set(case.rounds[0]) == {"generate", "ours, builtin", "ours, through transformers"}


def test_logits_that_are_not_the_models_own_up_to_rounding_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.Decoder, "logits", lambda *_: torch.ones(1, 64))
    with pytest.raises(ValueError, match=r"builtin logits are [\d.]+% off those of float32"):
        rollout.require_close_logits(random_model(TOY, dtype=torch.bfloat16), 6)


def test_prefix_runs_end_to_end_and_changes_nothing() -> None:
    assert prefix.run(SMALL).goals[1].is_met


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part not in ("gpu-loss", "gpu-checks")])
def test_each_part_for_a_gpu_runs_on_a_cpu_at_toy_shapes(part: str) -> None:
    assert gpu.PARTS[part](SMALL).cases


def test_every_check_for_a_gpu_passes_on_a_cpu_at_toy_shapes_or_says_why_it_was_not_made() -> None:
    figures = checks.run(replace(SMALL, size="quick")).cases[0].figures or {}
    verdicts = {what: row["verdict"] for what, row in figures.items()}
    assert {what for what, verdict in verdicts.items() if verdict == "not run"} == {
        what for what in verdicts if "compiler" in what or ("server" in what and shutil.which("vllm") is None)
    }
    assert "failed" not in verdicts.values()
    assert len(verdicts) > 25
    assert all(row["measured"] is not None or row["why"] for row in figures.values())


def test_a_check_beyond_its_tolerance_or_without_a_number_fails_and_so_does_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: Settings) -> Iterator[checks.Check]:
        yield checks.at_most(1.0, f"within, on {settings.device}", 1.0)
        yield checks.at_most(1.0, "beyond", 1.5)
        yield checks.at_most(1.0, "no number", float("nan"))
        raise RuntimeError("the kernel is missing")

    monkeypatch.setattr(checks, "GROUPS", {"broken": broken})
    assert checks_failed(checks.run(SMALL)) == ["beyond", "no number", "broken"]
    words = ["gpu-checks", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert main(words) == 1
    monkeypatch.setattr(checks, "GROUPS", {})
    assert main(words) == 0


def test_without_a_gpu_the_command_for_one_says_how_to_try_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "--device cpu --quick" in capsys.readouterr().err


def test_what_might_not_end_in_time_is_not_begun_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.__main__.run", lambda name, _: Result(name, []))
    monkeypatch.setattr("benchmarks.__main__.MINUTES_ON_GPU", 1.25)  # the guesses above 75 s are left
    assert main(["gpu", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "left out after 1.25 minutes: gpu-checks, gpu-loss, gpu-decode, gpu-step-8B; name them" in out


def test_the_loss_for_a_gpu_is_as_exact_in_bfloat16_as_asked() -> None:
    goals = [goal for goal in gpu.time_loss(SMALL).goals if "relative error" in goal.what]
    assert len(goals) == 8
    assert all(goal.is_met for goal in goals)


def test_step_runs_end_to_end() -> None:
    pytest.importorskip("trl", reason="needs the extra `bench`")
    found = step.run(SMALL)
    losses = (found.cases[0].figures or {})["first loss"]
    # Other completions of the same distribution: the first losses agree roughly, where another objective would not.
    assert losses["ours"] == pytest.approx(losses["TRL SDFTTrainer"], rel=0.5)


def test_control_and_demo_run_end_to_end() -> None:
    shares = (control.run(SMALL).cases[0].figures or {}).values()
    assert all(sum(row.values()) == pytest.approx(1) for row in shares)
    assert demo.run(SMALL).goals[1].is_met


def test_every_arm_but_full_exposure_looks_ahead() -> None:
    found = lookahead.run(SMALL)
    assert len(found.goals) == len(lookahead.ARMS) - 1
    shares = {}
    for arm, own in lookahead.ARMS.items():
        one = lookahead.train_a_little("micro", [*lookahead.SMALL, *own], 8)
        shares[arm] = one["control"] / one["update"]
    assert shares.pop(lookahead.BASE) < min(shares.values()) / 2


def test_a_share_of_the_look_ahead_is_what_an_arm_takes_longer() -> None:
    # By hand: 4 s beside 3 s is a quarter, 6 s a half.
    row = dict.fromkeys(lookahead.ARMS, 4.0) | {lookahead.BASE: 3.0, "token gate": 6.0}
    goals = {goal.what: goal for goal in lookahead.goals_of(Case("work", [row]))}
    gate = goals.pop("look-ahead, work, token gate: share of an update")
    assert [goal.measured.median for goal in goals.values()] == [0.25] * (len(lookahead.ARMS) - 2)
    assert (gate.measured.median, gate.is_met) == (0.5, False)
