r"""Whether a gold is an answer at all. One with which no checker could compare anything is refused by its row.

Words are answers (`no solution`), and so is mathematics with a remark (`x > 2 \text{ or } x < 1`). A sentence that
states the answer, an argument for it, or a word that stands for its absence is not: under it every right answer would
be judged wrong.
"""

from __future__ import annotations

import re

from atesd.data.equivalence import DEEPEST, LONGEST, depth
from atesd.data.quantities import read_quantity
from atesd.data.spelling import tidy

MOST_WORDS = 8
"""Words of two letters or more that an answer may have (two characters of Chinese or Japanese count as one)."""

_ENVIRONMENT = re.compile(r"\\begin\s*\{.*?\\end\s*\{[^{}]*\}", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_GROUPS = re.compile(r"\\text\{|[{}]")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{1,2}|[^\W\d_]{2,}")
_MATHEMATICS = re.compile(r"[\d\\=<>+^]")

_MARKUP = re.compile(r"</[A-Za-z]\w*>|<br\s*/?>|&(?:nbsp|lt|gt|amp|#\d+);|!\[[^\]]*\]\(|https?://")
_ABSENT = re.compile(
    r"proof|not ?found|n/?a|tbd|todo|no answer|(?:see|left as|refer to)\s.*|open[- ]ended.*|"
    r"answers? (?:\w+ )?var(?:y|ies)",
    re.IGNORECASE,
)
_VERDICT = re.compile(r"(?:yes|no|true|false)\s*[,.;:]\s*\S", re.IGNORECASE)
_LABEL = re.compile(r"[^\W\d_]{3,}(?:\s+[^\W\d_]+)*\s*:[^:]*")
_ARGUMENT = re.compile(r"\b(?:because|since|therefore|thus|hence|which means|follows that)\b", re.IGNORECASE)
_NEXT_SENTENCE = re.compile(r"[^\W\d_]{5}[.!?]\s+\S")
_NARRATED = re.compile(
    r"^\W*(?:so|let|then|now|note|suppose|assume|consider)\b|\b(?:he|she|they|we|you)\b", re.IGNORECASE
)
_STATED = re.compile(
    r"(?:\b(?:is|are|was|were|equals|makes|gives|es|est|ist|равно|равен|равна)\s+(?:[^\W\d_]+\s+){0,2}|是\s*|\b为\s*)"
    r"[-+($£€]*[\d\\]",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\b(?:if|when|where|for|unless|such that)\b", re.IGNORECASE)


def unreadable(gold: str) -> str | None:
    """Why no checker can compare anything with this gold; None if one can."""
    if len(gold) > LONGEST:
        return f"has {len(gold)} characters, of {LONGEST} that are read"
    if "####" in gold:
        return "holds the mark ####, with more than an answer behind it"
    if len(_ENVIRONMENT.sub("", gold).strip().splitlines()) > 1:
        return f"has {len(gold.strip().splitlines())} lines; name the column that holds the final answer alone"
    if depth(gold) > DEEPEST:
        return f"nests more than {DEEPEST} brackets"
    if _MARKUP.search(gold):
        return "holds markup of a page, which no checker reads; write the answer alone"
    words = _WORD.findall(_COMMAND.sub(" ", gold))
    if len(words) > MOST_WORDS:
        return f"is a text of {len(words)} words, which only the same words would match; allowed are {MOST_WORDS}"
    plain = tidy(gold)
    if not re.search(r"[^\W_]|\\[A-Za-z]", plain):
        return "holds neither a number nor a word"
    return None if read_quantity(gold) else _prose(" ".join(_GROUPS.sub(" ", plain).split()))


def _prose(text: str) -> str | None:
    """Why a short text is not the answer alone; None if it may be."""
    if _ABSENT.fullmatch(text):
        return "stands for an answer that is not there; leave the row out"
    stated = _STATED.search(text)
    sentence = (
        _ARGUMENT.search(text)
        or _VERDICT.match(text)
        or _LABEL.fullmatch(text)
        or _NEXT_SENTENCE.search(text)
        or (_MATHEMATICS.search(text) and _NARRATED.search(text))
        or (stated and not _CONDITION.search(text[: stated.start()]))
    )
    return "is a sentence around the answer, not the answer alone; name the column that holds it" if sentence else None
