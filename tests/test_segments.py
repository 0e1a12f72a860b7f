"""Segments: lossless, deterministic, never cut inside mathematics, a box or a code fence."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atesd.data.answers import last_boxed
from atesd.data.segments import cut, split_reference

SEGMENTERS = ["auto", "paragraph", "line", "sentence", "step", "token"]
PIECES = [
    " ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    "a",
    "B",
    "7",
    ".",
    "?",
    "$",
    "$$",
    "\\(",
    "\\)",
    "\\[",
    "\\]",
    "\\",
    "{",
    "}",
]
PIECES += ["[asy]", "[/asy]", "<pre>", "</pre>", "| a | b |\n", "|--|--|\n", "````"]
PIECES += [
    "\\begin{x}",
    "\\end{x}",
    "\\boxed{",
    "\\boxed",
    "```",
    "~~~",
    "Step 1:",
    "2.",
    "**",
    "e.g.",
    "。",
    "\u2028",
    "é",
]
messy_texts = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=40)

WHOLE = [
    "$a. B$",
    "$x\ny$",
    "$$a\n\nB. C$$",
    "\\(a. B\\)",
    "\\[ a.\n\nB \\]",
    "\\boxed{A. B {c} D}",
    "\\boxed{\\text{a b}}",
]
WHOLE += ["\\begin{cases}a. B\n\n\\begin{cases}C\\end{cases} D. E\\end{cases}", "$ a. B $"]
FENCES = ["```py\na. B\n\nc = $1\n```", "~~~\nA. B\n```\nC. D\n~~~"]
FENCES += [
    "```asy\ndraw((0,0)--(1,1));\n\nlabel($A$);\n```",
    "````\nA. B\n```\nC. D\n````",
    "  - ```\n    a. B\n\n    c\n    ```",
    "> ```\n> a. B\n> ```",
    "| a. B | c |\n|---|:-:|\n| 1 | Step 2. D |",
    "x | y. Z\n--- | ---\n1 | $2\n3 | 4",
    "| a. B | c |\n| d | e |",
    "+---+---+\n| a | b |\n+===+===+\n| 1 | 2 |\n+---+---+",
]
BODY = "a. B $x\n\nStep 2: c\n3. d & e \\\\ ) } \\] f\n\n"
WHOLE += [
    f"\\begin{{{name}}}{BODY}\\end{{{name}}}" for name in ("align*", "tabular", "tikzpicture", "array", "verbatim")
]
WHOLE += ["\\begin {equation}a.\n\nB\\end {equation}", "\\begin{a}\\begin{b}x\n\n\\end{b}. C\n\n\\end{a}"]
WHOLE += [f"[{name}]{BODY}[/{name}]" for name in ("asy", "ASY", "code", "latex")]
WHOLE += [f"<{name} border=1>{BODY}</{name}>" for name in ("table", "pre", "svg")]
WHOLE += ["[asy size=3]a.\n\n[asy]b.\n\n[/asy]\n\n[/asy]", "\\[x\n\n\\begin{cases}$a$. B\n\n\\end{cases}\n\ny\\]"]
WORDS = [
    "costs $5",
    "(see [asy] code)",
    "a \\begin{b} c",
    "<table>",
    "One",
    "is. Two",
    "costs 3.5",
    "x = 4.",
    "(so)",
    "Really? Yes",
]


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@given(text=messy_texts)
@example(text="\\boxed{a b")
@example(text="\r\n\r\n \n")
@example(text="\\\\boxed{a b} c")
def test_the_segments_concatenate_to_the_text_and_none_is_blank(segmenter, text):
    units = cut(text, segmenter)
    assert "".join(units) == text
    assert all(units)
    assert not any(unit.isspace() for unit in units) or len(units) == 1


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@given(data=st.data())
def test_nothing_that_is_delimited_is_ever_cut(segmenter, data):
    blocks = st.sampled_from(WHOLE + WORDS) | st.sampled_from(FENCES).map(lambda fence: f"\n{fence}\n")
    drawn = data.draw(st.lists(st.tuples(blocks, st.sampled_from([" ", "\n", "\n\n", ". "])), min_size=1))
    text = "".join(block + gap for block, gap in drawn)
    units = cut(text, segmenter)
    for block, _ in drawn:
        if block not in WORDS:
            assert sum(unit.count(block.strip()) for unit in units) == text.count(block.strip())


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@pytest.mark.parametrize("block", WHOLE + FENCES)
def test_a_block_stays_whole_whatever_stands_before_it(segmenter, block):
    for before in ("It costs $5.", "A $x$ and $y.", "Let $$a$$ be \\(b\\), \\[ and", "Use [code] and <pre>."):
        text = f"{before} A.\n\n{block}\n\nStep 7: so. End $6 \\boxed{{7}}"
        assert any(block in unit for unit in cut(text, segmenter))
        assert "".join(cut(text, segmenter)) == text


def test_text_around_a_block_is_cut_as_ever():
    drawing = "[asy]\nsize(3);\n\ndraw(A--B);\n[/asy]"
    assert cut(f"See.\n\n{drawing}\n\nAdd.\n\nStop.", "paragraph") == (
        "See.\n\n",
        f"{drawing}\n\n",
        "Add.\n\n",
        "Stop.",
    )


def test_a_marker_of_a_step_inside_a_block_marks_none():
    text = "```\n1. a\n2. b\n```\n\nFirst.\n\nThen."
    assert cut(text, "step") == cut(text, "auto") == ("```\n1. a\n2. b\n```\n\n", "First.\n\n", "Then.")


def test_lines_of_absolute_values_are_no_table():
    text = "|x| + |y| = |z|\n|x| < |y|\n|a - b| = |c|"
    assert len(cut(text, "line")) == 3


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@given(text=messy_texts)
@example(text="a \\boxed{1 2} b")
@example(text="\\\\boxed{a b} c")
@example(text="\\boxed 12 then \\boxed{ 3 4")
def test_segments_and_closing_are_the_solution_and_the_closing_holds_its_last_box(segmenter, text):
    segments, closing = split_reference(text, "9", segmenter)
    reference = "".join(segments) + closing
    box = last_boxed(text)
    if box is None:
        assert reference == text + ("\n\n" if text else "") + "Final answer: \\boxed{9}"
    else:
        assert reference == text
        assert last_boxed(closing) == box


def test_blank_lines_come_first_then_lines_then_sentences():
    assert cut("A.\nB.\n\nC. D.", "auto") == ("A.\nB.\n\n", "C. D.")
    assert cut("A. B.\nC. D.", "auto") == ("A. B.\n", "C. D.")
    assert cut("A. B.", "auto") == ("A. ", "B.")
    assert cut("A", "auto") == ("A",)
    assert cut("", "auto") == ()


def test_line_ends_of_every_system_stay_whole():
    assert cut("a\r\n\r\nb\r\nc", "paragraph") == ("a\r\n\r\n", "b\r\nc")
    assert cut("a\r\nb\nc\rd", "line") == ("a\r\n", "b\n", "c\r", "d")


def test_blank_lines_at_the_edges_belong_to_a_neighbour():
    assert cut("\n\na\n\n\n \n\nb\n\n", "line") == ("\n\na\n\n\n \n\n", "b\n\n")


@pytest.mark.parametrize(
    "whole",
    [
        "It is 3.5 m.",
        "Take e.g. Euler.",
        "Ask Dr. Who.",
        "See Fig. 2 and Eq. (3).",
        "By Thm. 4, it holds.",
        "It ends at 5 p.m. Monday.",
        "1. Add them.",
        "It fails... but why.",
        "He said i.e. Nothing.",
        "Let $x=1. Y$ be given.",
    ],
)
def test_a_sentence_with_a_full_stop_inside_is_one_sentence(whole):
    assert cut(f"{whole} Next one.", "sentence") == (f"{whole} ", "Next one.")


def test_sentences_end_at_marks_quotes_and_blank_lines():
    text = 'Why? "Yes." (No.) Then $x=1.$ So\n\nEnd 你好。再见！'
    expected = ("Why? ", '"Yes." ', "(No.) ", "Then $x=1.$ ", "So\n\n", "End 你好。", "再见！")
    assert cut(text, "sentence") == expected


def test_list_markers_stay_with_their_items():
    assert cut("First. 2. Then add. 3. Stop.", "sentence") == ("First. ", "2. Then add. ", "3. Stop.")


@pytest.mark.parametrize(
    "marker", ["Step 2:", "STEP 2.", "2.", "2)", "(2)", "**Step 2**", "**2.**", "## Step 2", "### 2."]
)
def test_a_step_starts_at_its_marker(marker):
    assert cut(f"Intro.\n\n{marker} a\nb\n", "step") == ("Intro.\n\n", f"{marker} a\nb\n")


def test_a_step_may_be_a_bare_heading():
    assert cut("## Step: add\nx\n## Step: stop", "step") == ("## Step: add\nx\n", "## Step: stop")


def test_numbers_and_plain_words_are_no_step_markers():
    text = "Intro.\n2.5 is less.\n1985. A year.\nStep by step.\nsee Step 3: a"
    assert cut(text, "step") == cut(text, "auto")


def test_without_markers_steps_are_cut_as_auto():
    assert cut("a\n\nb", "step") == ("a\n\n", "b")
    assert split_reference("A. B. \\boxed{1}", "1", "step") == (("A. ", "B. "), "\\boxed{1}")


def test_tokens_are_words_with_the_space_behind_them():
    assert cut(" a  b\n$c + d$ e", "token") == (" a  ", "b\n", "$c + d$ ", "e")


@pytest.mark.parametrize("opener", ["$x", "$ x", "$$", "\\(", "\\[", "\\begin{a}", "```", "\\boxed{"])
def test_a_delimiter_that_never_closes_is_ordinary_text(opener):
    assert cut(f"A. B {opener} c. D.\n\nE. F.", "sentence") == ("A. ", f"B {opener} c. ", "D.\n\n", "E. ", "F.")


def test_prices_are_not_mathematics():
    text = "It costs $5. He pays $6. The rest, $1, is $x + y. z$."
    assert cut(text, "sentence") == ("It costs $5. ", "He pays $6. ", "The rest, $1, is $x + y. z$.")


def test_a_dollar_before_a_digit_closes_nothing():
    assert cut("Pay A$5. Or B$6. End.", "sentence") == ("Pay A$5. ", "Or B$6. ", "End.")


def test_a_dollar_does_not_reach_over_a_blank_line():
    assert cut("a $x. B\n\nc$ d", "paragraph") == ("a $x. B\n\n", "c$ d")


def test_escaped_delimiters_are_text():
    assert cut("Pay \\$5. Or \\$6. Row \\\\[2pt] x. End \\].", "sentence")[:2] == ("Pay \\$5. ", "Or \\$6. ")


def test_inline_code_with_three_backticks_opens_no_fence():
    assert cut("```x = 1```\n\nb\n\n```\nc", "paragraph") == ("```x = 1```\n\n", "b\n\n", "```\nc")


def test_the_closing_is_the_unit_with_the_last_box_and_all_behind_it():
    solution = "We try \\boxed{1}.\n\nNo.\n\nSo $\\boxed{2}$.\n\nCheck: fine."
    segments, closing = split_reference(solution, "2", "auto")
    assert segments == ("We try \\boxed{1}.\n\n", "No.\n\n")
    assert closing == "So $\\boxed{2}$.\n\nCheck: fine."


def test_a_reference_in_one_unit_has_no_segments():
    assert split_reference("It is \\boxed{4}", "4", "auto") == ((), "It is \\boxed{4}")
    assert split_reference("", "4", "auto") == ((), "Final answer: \\boxed{4}")


def test_a_solution_without_a_box_is_closed_with_its_answer():
    assert split_reference("a\nb", "\\frac{1}{2}", "line") == (("a\n", "b"), "\n\nFinal answer: \\boxed{\\frac{1}{2}}")


def test_auto_cuts_finer_where_only_the_answer_stands_apart():
    # By blank lines one segment is left, which no ratio below 1 would ever show.
    assert split_reference("a\nb\nc\n\n\\boxed{7}", "7", "auto") == (("a\n", "b\n", "c\n\n"), "\\boxed{7}")


def test_the_words_of_the_world_are_cut_as_tokens():
    assert split_reference("a 7 ; \\boxed{7}", "7", "token") == (("a ", "7 ", "; "), "\\boxed{7}")


def test_an_unknown_segmenter_is_refused_by_name():
    with pytest.raises(ValueError, match="'words'; allowed: auto, paragraph"):
        cut("a", "words")


@pytest.mark.parametrize(
    "piece",
    [
        *("$a ", "\\[", "\\boxed{", "```\n", "$$", "\\begin{a}", ". ", "...", " \n", "{", "\t", "\\"),
        *("[asy]", "[asy ", "<table", "<pre>\n", "| a |\n", "|-", "-", "|", ">", "+-", "````x\n```\n", "~~~~\n~~~\n"),
        *("\\begin{a}$\\end{a}", "[asy]$[/asy]\n\n", "$\\begin{a}", "\\begin{a", "\\begin ", "1. ```\n"),
    ],
)
def test_hostile_texts_are_cut_in_linear_time(piece):
    text = piece * (60_000 // len(piece))
    started = time.process_time()
    for segmenter in SEGMENTERS:
        assert "".join(cut(text, segmenter)) == text
    assert time.process_time() - started < 4  # seconds; quadratic behaviour takes minutes


def test_an_answer_that_is_boxed_on_the_way_begins_the_closing() -> None:
    solution = "Add 2 and 3.\n\nThis is \\boxed{5}.\n\nCheck: 5 - 3 = 2.\n\nSo the answer is \\boxed{5}."
    segments, closing = split_reference(solution, "5", "paragraph")
    assert segments == ("Add 2 and 3.\n\n",)
    assert "".join(segments) + closing == solution


def test_an_answer_in_a_box_beside_another_begins_the_closing_too() -> None:
    solution = "Add.\n\nThus \\boxed{ 5 }, hmm, or \\boxed{3}?\n\nNo.\n\nFinally \\boxed{5}."
    assert split_reference(solution, "5", "paragraph")[0] == ("Add.\n\n",)
    solution = solution.replace("\\boxed{ 5 }", "\\boxed{57}")
    assert len(split_reference(solution, "5", "paragraph")[0]) == 3


def test_another_box_on_the_way_is_a_step_like_any_other() -> None:
    solution = "First \\boxed{4}.\n\nThen add 1.\n\nSo \\boxed{5}."
    segments, closing = split_reference(solution, "5", "paragraph")
    assert segments == ("First \\boxed{4}.\n\n", "Then add 1.\n\n")
    assert closing == "So \\boxed{5}."
