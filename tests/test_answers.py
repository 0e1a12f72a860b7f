"""Reading and checking final answers."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.config import config_from_mapping
from atesd.data import answers
from atesd.data.answers import ExactChecker, MathChecker, last_boxed, marked_answer, without_mark
from atesd.data.own_checker import configured_checker
from atesd.data.spelling import normalise
from atesd.errors import DataError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} done", r"\{1, 2\}"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed {7}", "7"),
        (r"\fbox{x}", "x"),
        (r"$\boxed 7$", "7"),
        (r"\boxed-12.5 metres", "-12.5"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\text{no } x}", r"\text{no } x"),
        ("no box", None),
        (r"\boxed{}", None),
        (r"\boxed", None),
        (r"\boxed{7", None),
        (r"\boxed{1} and then \boxed{\frac{1}{2}", None),
        (r"\boxed{7\}", None),
        (r"\boxedness{7}", None),
        (r"\boxed\frac12", None),
        (r"\boxed\textbf{(C)} then", r"\textbf{(C)}"),
        (r"\boxed\mathbf{7", None),
    ],
)
def test_the_answer_is_the_content_of_the_last_box(text, answer):
    assert last_boxed(text) == answer


nested = st.recursive(
    st.text(st.characters(exclude_characters="{}\\"), max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
)


@given(before=st.text(max_size=20), content=nested, after=st.text(st.characters(exclude_characters="\\"), max_size=20))
def test_any_balanced_content_comes_back_whole(before, content, after):
    assert last_boxed(before + r"\boxed{" + content + "}" + after) == (content.strip() or None)


SPELLINGS = [
    (r"$\dfrac{1}{2}$", r"\frac{1}{2}"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    ("1,234", "1234"),
    (r"1,\!234{,}567.5", "1234567.5"),
    (r"5\text{ cm}.", "5cm"),
    (r"\$5", "5"),
    (r"x\;=\quad 3", "x=3"),
    (r"\tfrac12", r"\frac12"),
    (r"\pi\text{r}", r"\pi r"),  # not the unknown command \pir
    (r"\text{\textbf{a} {b}}", "a{b}"),
    ("32, 349", "32, 349"),
    (r"32,\! 349", "32349"),
    ("0,111", "0,111"),
]


@pytest.mark.parametrize(("answer", "spelling"), SPELLINGS)
def test_spellings_of_one_answer_become_one_string(answer, spelling):
    assert normalise(answer) == spelling


@pytest.mark.parametrize(
    ("one", "other"),
    [("1 2", "12"), ("(1,234)", "(1234)"), ("1, 234", "1234"), ("50\\%", "50"), ("-1", "1"), ("A", "a")],
)
def test_different_answers_stay_different_strings(one, other):
    assert normalise(one) != normalise(other)


latex = st.lists(
    st.sampled_from(
        ["1", "23", ",", " ", "$", ".", "~", "{", "}", "\\", r"\text{", r"\dfrac", r"\left", r"\!", r"\ ", "x"]
    )
).map("".join)


@given(latex)
def test_normalising_twice_is_normalising_once(answer):
    assert normalise(normalise(answer)) == normalise(answer)


@pytest.mark.parametrize(
    ("text", "answer", "rest"),
    [
        ("a\n#### 18", "18", "a"),
        ("a\n\n  ####  1,234  \n\n", "1,234", "a"),
        ("#### -3", "-3", ""),
        ("a\n#### 18\nmore", None, "a\n#### 18\nmore"),
        ("a\n##### heading", None, "a\n##### heading"),
        ("a\n####", None, "a\n####"),
    ],
)
def test_the_marked_answer_is_on_the_last_line(text, answer, rest):
    assert (marked_answer(text), without_mark(text)) == (answer, rest)


def test_the_exact_checker_tells_wrong_from_missing():
    pairs = [(r"\boxed{ 7 }", "7"), (r"\boxed{8}", "7"), ("7", "7"), (r"\boxed{7", "7")]
    assert ExactChecker().check(pairs) == ["correct", "wrong", "unparseable", "unparseable"]


@pytest.fixture(scope="module")
def checker():
    with contextlib.closing(MathChecker(workers=2)) as checker:
        yield checker


EQUAL = ("(x+1)^2", "x^2+2x+1")  # pairs that only algebra can judge
ALSO_EQUAL = ("(a-b)(a+b)", "a^2-b^2")
UNEQUAL = ("(x+1)^2", "x^2+2x+2")


def boxed(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return [(rf"so \boxed{{{answer}}}", gold) for answer, gold in pairs]


def test_equal_mathematics_is_correct_however_it_is_spelt(checker):
    equal = boxed(("0.5", r"\frac12"), ("(x+1)^2", "x^2+2x+1"), (r"\{2, 1\}", r"\{1,2\}"), ("x=5", "5"), ("7.0", "7"))
    assert checker.check(equal) == ["correct"] * 5
    assert checker.check(boxed(("0.51", r"\frac12"), ("(2,1)", "(1,2)"))) == ["wrong", "wrong"]


def test_what_cannot_be_read_is_unparseable_and_not_wrong(checker):
    assert checker.check([*boxed((r"\frac{", "7")), ("no box", "7"), *boxed(("???", "7"))]) == ["unparseable"] * 3


def test_a_gold_that_cannot_be_read_is_compared_as_a_string(checker):
    assert checker.check(boxed(("???", " ??? "), ("7", "???"))) == ["correct", "wrong"]


def test_a_comparison_that_hangs_is_a_timeout_and_costs_the_others_nothing(checker):
    hang = r"9^{9^{9^{9}}}"
    verdicts = checker.check(boxed(EQUAL, (hang, "7x"), ALSO_EQUAL, UNEQUAL))
    assert verdicts == ["correct", "timeout", "correct", "wrong"]
    assert checker.check(boxed(EQUAL)) == ["correct"]


def test_a_process_that_is_held_up_loses_no_processor_time():
    with contextlib.closing(MathChecker(workers=1, seconds=1.0)) as checker:
        checker.check(boxed(EQUAL))
        process = checker._pool._workers[0].process
        process.send_signal(signal.SIGSTOP)
        release = threading.Timer(1.5, process.send_signal, [signal.SIGCONT])  # longer than the limit
        release.start()
        assert checker.check(boxed(ALSO_EQUAL)) == ["correct"]
        release.join()
        assert checker._pool._workers[0].process is process


def test_a_comparison_that_eats_its_memory_is_a_timeout_and_not_wrong():
    with contextlib.closing(MathChecker(workers=1, seconds=20.0, memory_mb=150)) as checker:
        assert checker.check(boxed(("2^{2000000000}x", "7x"), EQUAL)) == ["timeout", "correct"]


def test_a_pair_whose_process_dies_over_it_is_tried_again_in_a_new_one(checker, monkeypatch):
    checker.check(boxed(EQUAL, ALSO_EQUAL))
    take, killed = answers._Worker.take, []

    def take_and_die(worker, job, pairs):
        if worker.used and not killed:
            killed.append(worker.process.pid)
            worker.process.kill()
        take(worker, job, pairs)

    monkeypatch.setattr(answers._Worker, "take", take_and_die)
    assert checker.check(boxed(EQUAL, UNEQUAL)) == ["correct", "wrong"]
    assert len(killed) == 1


FIRST_STARTS_DIE = """
import pathlib, sys
tries = pathlib.Path(__file__).with_name("tries")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) <= DEATHS:
    sys.exit(1)
print('["ready", false]', flush=True)
for line in sys.stdin:
    print('["correct", false]', flush=True)
"""


@pytest.mark.parametrize("deaths", [2, 3])
def test_a_process_that_dies_while_it_starts_is_started_again_twice(tmp_path, monkeypatch, deaths):
    program = tmp_path / "worker.py"
    program.write_text(FIRST_STARTS_DIE.replace("DEATHS", str(deaths)))
    monkeypatch.setattr(answers, "_WORKER", program)
    with contextlib.closing(MathChecker(workers=1)) as checker:
        if deaths == 2:
            assert checker.check(boxed(EQUAL)) == ["correct"]
        else:
            with pytest.raises(DataError, match="died without a word"):
                checker.check(boxed(EQUAL))


GROWN = """
import pathlib, sys
with pathlib.Path(__file__).with_name("starts").open("a") as starts:
    starts.write("x")
print('["ready", false]', flush=True)
for line in sys.stdin:
    print('["correct", true]', flush=True)
"""


def test_a_process_that_has_grown_leaves_after_its_reply(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(GROWN)
    monkeypatch.setattr(answers, "_WORKER", tmp_path / "worker.py")
    with contextlib.closing(MathChecker(workers=1)) as checker:
        assert checker.check(boxed(EQUAL, ALSO_EQUAL, EQUAL)) == ["correct"] * 3
    assert (tmp_path / "starts").read_text() == "xxx"


LARGE_PARENT = r"""
held = b"x" * (600 << 20)
from atesd.data.answers import MathChecker
print(*MathChecker(workers=1, seconds=20.0, memory_mb=512).check([(r"\boxed{x+6}", "x+9"), (r"\boxed{7}", "9x")]))
"""


def test_what_the_parent_holds_is_not_counted_as_memory_of_a_comparison():
    done = subprocess.run([sys.executable, "-c", LARGE_PARENT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["wrong", "wrong"]


def test_equal_strings_need_no_process():
    checker = MathChecker()
    assert checker.check(boxed((r"\dfrac{1}{2}", r"$\frac{1}{2}$"))) == ["correct"]
    assert checker._pool._workers == []


def test_verdicts_come_in_the_order_of_the_pairs(checker):
    pairs = [(f"x+{n}", f"{n}+x" if n % 3 else f"{n}+2x") for n in range(40)]
    assert checker.check(boxed(*pairs)) == ["correct" if n % 3 else "wrong" for n in range(40)]


def test_a_process_that_dies_is_replaced(checker):
    checker.check(boxed(EQUAL))
    idle = next(worker for worker in checker._pool._workers if worker.idle)
    idle.process.kill()
    idle.process.wait()
    assert checker.check(boxed(EQUAL, ALSO_EQUAL)) == ["correct", "correct"]


def test_processes_ignore_ctrl_c(checker):
    checker.check(boxed(EQUAL))
    processes = [worker.process for worker in checker._pool._workers]
    for process in processes:
        process.send_signal(signal.SIGINT)
    assert checker.check(boxed(ALSO_EQUAL)) == ["correct"]
    assert processes[0] in [worker.process for worker in checker._pool._workers]


def test_an_interrupted_check_leaves_no_process_and_no_late_verdict(checker, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("atesd.data.answers.wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checker.check(boxed(EQUAL, UNEQUAL))
    assert checker._pool._workers == []
    assert checker.check(boxed(UNEQUAL, EQUAL)) == ["wrong", "correct"]


@pytest.mark.parametrize("closed", [True, False])
def test_closing_or_forgetting_a_checker_ends_its_processes(closed):
    checker = MathChecker(workers=1)
    checker.check(boxed(EQUAL))
    process = checker._pool._workers[0].process
    if closed:
        checker.close()
    del checker
    assert process.returncode is not None  # waited for: no zombie


def test_a_checker_that_cannot_start_says_why():
    with pytest.raises(DataError, match=r"data.checker: math cannot run.*10 MB"):
        MathChecker(workers=1, memory_mb=10).check(boxed(EQUAL))


def test_the_worker_needs_nothing_of_the_package():
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(sorted({'atesd', 'torch'} & set(sys.modules)))"
    path = str(Path(answers.__file__).with_name("answer_worker.py"))
    done = subprocess.run([sys.executable, "-P", "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_each_kind_has_its_checker():
    kinds = {kind: configured_checker(config_from_mapping({"data": {"checker": kind}})) for kind in ("exact", "math")}
    assert {kind: type(made) for kind, made in kinds.items()} == {"exact": ExactChecker, "math": MathChecker}
    assert configured_checker(config_from_mapping({"data": {"checker": "none"}})) is None
