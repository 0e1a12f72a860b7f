"""Views: the teacher sees exactly floor(ratio * m) segments and the answer, and full exposure is the OPSD view."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atesd.config import ViewsConfig
from atesd.data.segments import split_reference
from atesd.data.views import TextRenderer, make_view, shown_segments
from atesd.errors import ConfigError, DataError
from atesd.records import Problem

ADD = Problem("add", "What is 1+1+1?", ("1+1=2\n", "2+1=3\n"), "So \\boxed{3}.", "3")
RATIOS = st.floats(0, 1) | st.fractions(0, 1, max_denominator=40).map(float)
POLICIES = st.sampled_from(["keep", "withhold", "only"])
WORDINGS = st.sampled_from(["adaptive", "constant"])


def always(_: str) -> bool:
    return True


def view(problem: Problem, reveal_ratio: float, **wording: str) -> str:
    return make_view(problem, reveal_ratio, TextRenderer(ViewsConfig(**wording)), always).text


@st.composite
def solved_problems(draw: st.DrawFn) -> Problem:
    """Any text, cut by any segmenter."""
    solution = draw(st.text(alphabet="ab. {}\n$\\9", max_size=60) | st.text(max_size=30))
    segmenter = draw(st.sampled_from(["auto", "paragraph", "line", "sentence", "step", "token"]))
    answer = draw(st.text(alphabet="ab{}9", min_size=1, max_size=4))
    segments, closing = split_reference(solution, answer, segmenter)
    return Problem("p", draw(st.text(max_size=20)), segments, closing, answer)


@st.composite
def marked_problems(draw: st.DrawFn) -> Problem:
    """Each segment carries a character of its own (from a private area) that no other text has."""
    filler = st.text(alphabet="ab {}\n>$", max_size=5)
    segments = tuple(chr(0xE000 + i) + draw(filler) for i in range(draw(st.integers(0, 12))))
    return Problem("p", draw(filler), segments, "\uf000 \\boxed{\uf001}", "\uf001")


@given(ratio=RATIOS, total=st.integers(0, 500))
def test_the_number_of_segments_is_the_exact_floor(ratio, total):
    # Rational arithmetic needs no guard; the guard only moves what lies within 1e-9 of a whole number.
    shown = shown_segments(ratio, total)
    exact = Fraction(ratio) * total
    assert shown <= exact + Fraction(2, 10**9)
    assert shown + 1 > exact
    assert 0 <= shown <= total


def test_a_ratio_that_means_k_segments_shows_k_whatever_its_rounding():
    assert all(shown_segments(k / m, m) == k for m in range(1, 400) for k in range(m + 1))
    assert shown_segments(0.1 + 0.2, 10) == 3
    assert shown_segments(0.7 * 3 / 3, 10) == 7
    assert shown_segments(1.0, 0) == 0
    assert shown_segments(0.4999999, 2) == 0  # nothing is rounded up but rounding errors


def test_only_a_ratio_of_one_shows_the_closing():
    assert "So \\boxed{3}." in view(ADD, 1.0)
    assert "So \\boxed{3}." not in view(ADD, 0.9999999)


@pytest.mark.parametrize("ratio", [float("nan"), -1e-12, 1.0000001, float("inf")])
def test_a_ratio_outside_of_zero_to_one_is_refused(ratio):
    with pytest.raises(ValueError, match="is not in"):
        shown_segments(ratio, 3)
    with pytest.raises(ValueError, match="is not in"):
        view(ADD, ratio)


def test_a_negative_number_of_segments_is_refused():
    with pytest.raises(ValueError, match="-1 segments"):
        shown_segments(0.5, -1)


@given(problem=solved_problems(), wording=WORDINGS)
def test_full_exposure_renders_the_opsd_view_byte_for_byte(problem, wording):
    expected = (
        f"Problem: {problem.text}"
        "\n\nReference solution:\n<<<\n" + problem.reference + "\n>>>"
        "\n\nStudy the reference until you see why it is right. Then solve the problem yourself, in your own words."
        "\n\nReason step by step and put the final answer inside \\boxed{}."
    )
    assert view(problem, 1.0, wording=wording) == expected


@given(problem=solved_problems(), wording=WORDINGS)
def test_full_exposure_follows_the_users_wording_exactly(problem, wording):
    texts = {
        "problem_text": "Q={problem}?",
        "reference_begin": "=== {begin} ===\n",
        "reference_end": "\n=== end ===\n",
        "transition": "\nNow {you}.\n",
        "instruction": "Box it: \\boxed{}",
    }
    expected = f"Q={problem.text}?\n\n=== {{begin}} ===\n{problem.reference}\n=== end ===\n"
    expected += "\n\n\nNow {you}.\n\n\nBox it: \\boxed{}"
    assert view(problem, 1.0, wording=wording, **texts) == expected


@given(problem=solved_problems(), ratio=st.floats(0, 0.999), wording=WORDINGS)
def test_below_one_the_view_is_the_first_segments_and_the_answer(problem, ratio, wording):
    config = ViewsConfig(wording=wording)
    head = f"Problem: {problem.text}\n\n{config.reference_begin}"
    tail = f"{config.reference_end}\n\n{config.transition}\n\n{config.instruction}"
    text = view(problem, ratio, wording=wording)
    assert text.startswith(head)
    assert text.endswith(tail)
    visible = text[len(head) : len(text) - len(tail)]
    shown = "".join(problem.segments[: int(ratio * len(problem.segments) + 1e-9)])
    note = "[The reference may be incomplete from here on.]\n" if wording == "adaptive" else ""
    gap = "\n" if shown and not shown.endswith("\n") else ""
    assert visible == f"{shown}{gap}{note}Final answer: \\boxed{{{problem.answer}}}"


@given(problem=marked_problems(), ratio=RATIOS, policy=POLICIES, wording=WORDINGS)
def test_nothing_beyond_the_ratio_leaks(problem, ratio, policy, wording):
    made = make_view(problem, ratio, TextRenderer(ViewsConfig(answer=policy, wording=wording)), always)
    seen = [character for character in made.text if "\ue000" <= character < "\uf000"]
    total = len(problem.segments)
    expected = 0 if policy == "only" else max(k for k in range(total + 1) if k <= ratio * total + 1e-9)
    assert seen == [segment[0] for segment in problem.segments[:expected]]
    assert made.shown_segments == expected
    assert made.total_segments == total
    whole = ratio >= 1 - 1e-9
    assert made.text.count("\uf000") == (1 if whole and policy == "keep" else 0)  # the closing
    assert made.text.count("\uf001") == (0 if policy == "withhold" else 1)  # the answer, never twice


@given(problem=marked_problems(), policy=POLICIES, wording=WORDINGS)
def test_views_of_growing_ratio_are_nested_up_to_the_cut(problem, policy, wording):
    total = len(problem.segments)
    assume(total)
    config = ViewsConfig(answer=policy, wording=wording)
    views = [make_view(problem, k / total, TextRenderer(config), always) for k in range(total + 1)]
    for shorter, longer in pairwise(views):
        shown = "".join(problem.segments[: shorter.shown_segments])
        assert longer.text.startswith(f"Problem: {problem.text}\n\n{config.reference_begin}{shown}")


def test_ratio_zero_is_the_answer_alone_and_not_an_empty_reference():
    note = "[The reference may be incomplete from here on.]\n"
    assert f"<<<\n{note}Final answer: \\boxed{{3}}\n>>>" in view(ADD, 0.0)
    assert "<<<\nFinal answer: \\boxed{3}\n>>>" in view(ADD, 0.0, wording="constant")


def test_without_segments_only_full_exposure_shows_the_closing():
    bare = replace(ADD, segments=())
    assert "<<<\nSo \\boxed{3}.\n>>>" in view(bare, 1.0)
    assert "on.]\nFinal answer: \\boxed{3}\n>>>" in view(bare, 0.99)
    assert make_view(bare, 0.5, TextRenderer(ViewsConfig()), always).effective_ratio == 1.0


def test_withholding_the_answer_shows_segments_only():
    assert "<<<\n1+1=2\n[The reference may be incomplete from here on.]\n>>>" in view(ADD, 0.5, answer="withhold")
    assert "<<<\n1+1=2\n2+1=3\n\n>>>" in view(ADD, 1.0, answer="withhold")


def test_the_answer_alone_reads_the_same_at_every_ratio():
    assert view(ADD, 0.0, answer="only") == view(ADD, 1.0, answer="only")
    made = make_view(ADD, 1.0, TextRenderer(ViewsConfig(answer="only")), always)
    assert made.effective_ratio == 0.0
    assert "<<<\nFinal answer: \\boxed{3}\n>>>" in made.text


def test_the_student_reads_the_problem_and_what_is_asked_for():
    student = TextRenderer(ViewsConfig()).student(ADD)
    assert student == "Problem: What is 1+1+1?\n\nReason step by step and put the final answer inside \\boxed{}."


def test_empty_texts_leave_no_gap():
    texts = {"transition": "", "instruction": "", "partial_note": ""}
    assert view(ADD, 0.5, **texts).endswith("<<<\n1+1=2\nFinal answer: \\boxed{3}\n>>>")
    assert TextRenderer(ViewsConfig(**texts)).student(ADD) == "Problem: What is 1+1+1?"


@pytest.mark.parametrize("text", ["{answer}", "{0}", "{{x}}", "}{", "%s", "{problem}"])
def test_braces_in_problems_and_answers_are_only_text(text):
    odd = replace(ADD, text=text, answer=text)
    assert view(odd, 0.0).startswith(f"Problem: {text}\n\n")
    assert f"Final answer: \\boxed{{{text}}}\n>>>" in view(odd, 0.0)


@pytest.mark.parametrize(
    ("setting", "template"),
    [
        ("problem_text", "Problem:"),
        ("problem_text", "{problem} {answer}"),
        ("problem_text", "{problem.id}"),
        ("answer_text", "\\boxed{answer} {}"),
        ("answer_text", "\\boxed{{answer}"),
    ],
)
def test_a_wording_without_its_placeholder_is_refused_by_name(setting, template):
    with pytest.raises(ConfigError, match=f"views.{setting}"):
        TextRenderer(ViewsConfig(**{setting: template}))


@given(problem=marked_problems(), ratio=RATIOS, policy=POLICIES, spare=st.integers(-5, 60))
def test_a_view_that_is_too_long_drops_segments_from_the_end(problem, ratio, policy, spare):
    renderer = TextRenderer(ViewsConfig(answer=policy))
    shortest = len(renderer.teacher(problem, 0, False))
    limit = shortest + max(spare, 0)
    made = make_view(problem, ratio, renderer, lambda text: len(text) <= limit)
    assert len(made.text) <= limit
    assert problem.text in made.text
    assert ("\uf001" in made.text) == (policy != "withhold")
    # By brute force: the most segments below the ratio whose view fits; the whole reference only if all of it fits.
    shown = shown_segments(ratio, len(problem.segments))
    whole = renderer.teacher(problem, shown, ratio >= 1 - 1e-9)
    if len(whole) <= limit:
        assert made.text == whole
    else:
        texts = [renderer.teacher(problem, k, False) for k in range(max(shown, 1))]
        assert made.text == [text for text in texts if len(text) <= limit][-1]


def test_the_effective_ratio_tells_what_was_dropped():
    long = replace(ADD, segments=tuple(f"step {i} " * 10 for i in range(8)))
    renderer = TextRenderer(ViewsConfig())
    limit = len(renderer.teacher(long, 3, False))
    made = make_view(long, 1.0, renderer, lambda text: len(text) <= limit)
    assert (made.shown_segments, made.total_segments, made.effective_ratio) == (3, 8, 3 / 8)


def test_a_whole_reference_that_is_too_long_loses_a_segment_with_its_closing():
    wordy = replace(ADD, closing="So, " * 100 + "\\boxed{3}.")
    renderer = TextRenderer(ViewsConfig())
    made = make_view(wordy, 1.0, renderer, lambda text: len(text) < 400)
    assert made.shown_segments == 1
    assert made.text == renderer.teacher(wordy, 1, False)


def test_a_problem_that_does_not_fit_without_any_segment_is_refused_by_its_id():
    with pytest.raises(DataError, match=r"problem 'add': .* model.max_context_tokens"):
        make_view(ADD, 0.5, TextRenderer(ViewsConfig()), lambda text: len(text) < 30)
