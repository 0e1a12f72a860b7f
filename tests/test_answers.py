"""Reading and checking final answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.data.answers import last_boxed


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
