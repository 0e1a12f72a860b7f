"""Text of users beside the control tokens of a tokenizer: it never becomes one, whatever it says.

A control token is an added token of the tokenizer, such as `<|im_end|>` or `<think>`; added tokens of white space, or
of plain letters that no template writes, are ordinary text. Where a user's text spells one, its letters are masked,
each for itself, while the template is rendered. What the rendering then spells is the template's own. Those are
renamed, the mask is taken off, and the whole is read in one go by a copy of the tokenizer that knows control tokens
only by their new names: what is beside them is normalised, split and merged as ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypedDict, final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from atesd.errors import ModelError

_MASKS = (0xF0000, 0xF8000, 0x100000, 0x108000)  # private characters: no script, no case, no white space
_MASKS_EACH = 0x8000
_NAME_DIGITS = [chr(0x10900 + i) for i in range(16)]  # Phoenician: letters without case that no normaliser takes away
_NAME_LENGTH = 12
_NAME = re.compile(f"[{''.join(_NAME_DIGITS)}]{{{_NAME_LENGTH}}}")


@final
class ControlTokens:
    """The control tokens of a tokenizer and how text is kept apart from them. `template` is its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self._tokens = {
            token.content: token
            for token in added.values()
            if _is_control(token.content, bool(token.special), template)
        }
        self._spelled = re.compile(_any_of(self._tokens)) if self._tokens else None
        # Whether such a token is one depends on the letter beside it, so on the text: a border cannot be judged by it.
        self.depend_on_neighbours = any(token.single_word for token in self._tokens.values())
        unknown = _unknown_id(tokenizer)
        self.ids = frozenset(i for i, token in added.items() if token.content in self._tokens and i != unknown)

    def spelled_in(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return self._spelled is not None and self._spelled.search(text) is not None

    def among(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The control tokens among token ids, in order."""
        return tuple(i for i in ids if i in self.ids)

    def mask_for(self, texts: Iterable[str]) -> Mask:
        """A mask whose private characters are in none of these texts. Raises `ModelError` if there is none."""
        present = set().union(*texts)
        letters = sorted({letter for token in self._tokens for letter in token if not letter.isspace()})
        for base in _MASKS:
            if not any(base <= ord(letter) < base + _MASKS_EACH for letter in present):
                return Mask({letter: chr(base + i) for i, letter in enumerate(letters)}, self._spelled)
        raise ModelError("a text holds private characters of every plane beside a control token; take either out")

    def read(self, rendering: str, mask: Mask) -> tuple[int, ...]:
        """Token ids of a rendering in which the users' texts are masked: only the template writes control tokens.

        Raises `ModelError` where that cannot be kept, for instance because the tokenizer has no fast backend.
        """
        masked = rendering
        if _NAME.search(masked):
            raise ModelError(
                "a text holds the Phoenician letters by which control tokens are called while it is read; take them out"
            )
        for spelled, names in self._stages:
            masked = spelled.sub(partial(_called, names), masked)
        ids = tuple(self._reader.encode(mask.taken_off(masked), add_special_tokens=False).ids)
        wanted = self.among(ids_of(self._tokenizer, [rendering])[0])
        if self.among(ids) != wanted:
            raise ModelError(
                "the tokenizer makes a control token of a text that only spells one, or loses one of the template's; "
                "take the text out of the data, or use a model with another tokenizer"
            )
        return ids

    def read_plain(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that is a user's from end to end."""
        mask = self.mask_for([text])
        return self.read(mask.put_on(text, wholly=True), mask)

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """What each control token is called in the copy: names of one length, so that none begins another."""
        return {content: _name(place) for place, content in enumerate(self._tokens)}

    @cached_property
    def _stages(self) -> list[tuple[re.Pattern[str], Mapping[str, str]]]:
        """Tokens are found as the tokenizer finds them: first in the raw text, then those that it normalises."""
        kinds = ([t for t, token in self._tokens.items() if bool(token.normalized) is kind] for kind in (False, True))
        return [(re.compile(_any_of(some)), {t: self._names[t] for t in some}) for some in kinds if some]

    @cached_property
    def _reader(self) -> Tokenizer:
        """The copy of the tokenizer. Every control token has its old id there, under its new name."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                "a text spells a control token, and this tokenizer has no fast backend with which it could be read as "
                "text; use a model with tokenizer.json, or take the text out of the data"
            )
        try:
            reader = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), self._names)))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelError(
                f"the tokenizer cannot be copied to read a text that spells a control token: {error}"
            ) from None
        for content, name in self._names.items():
            if reader.token_to_id(name) != backend.token_to_id(content):
                raise ModelError(f"the tokenizer's {content} has another id in a copy of it; use another tokenizer")
        return reader


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with no begin or end token. Raises `ModelError` for a text that the tokenizer refuses."""
    try:
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids]
    except Exception as error:  # tokenizers raises nothing narrower
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the tokenizer cannot read a text: {reason}; its vocabulary lacks characters of your data, or "
            "tokenizer.json is damaged"
        ) from None


@final
class Mask:
    """Private characters in place of those that control tokens are made of; one for one, and back."""

    def __init__(self, letters: Mapping[str, str], spelled: re.Pattern[str] | None) -> None:
        self._on = str.maketrans(dict(letters))
        self._off = str.maketrans({private: letter for letter, private in letters.items()})
        self._spelled = spelled

    def put_on(self, text: str, *, wholly: bool) -> str:
        """The text with all such characters masked, or only those of the control tokens that it spells."""
        if wholly or self._spelled is None:
            return text.translate(self._on)
        return self._spelled.sub(lambda found: found.group().translate(self._on), text)

    def taken_off(self, text: str) -> str:
        """The text as it was."""
        return text.translate(self._off)


def _is_control(content: str, special: bool, template: str) -> bool:
    letters = content.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    if not letters.strip():
        return False
    return special or content in template or not letters.replace(" ", "").isalnum()


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that stands for what the vocabulary lacks: any text may become it, so it controls nothing."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown = getattr(model, "unk_token", None) or (tokenizer.unk_token if type(model).__name__ == "Unigram" else None)
    found = None if unknown is None else tokenizer.convert_tokens_to_ids(unknown)
    return found if isinstance(found, int) else None


def _called(names: Mapping[str, str], found: re.Match[str]) -> str:
    return names[found.group()]


def _name(place: int) -> str:
    return "".join(_NAME_DIGITS[place >> 4 * digit & 15] for digit in range(_NAME_LENGTH))


_Tree = dict[str, "_Tree"]
"""Letters, and below each the letters that may follow it; an empty one ends a word."""


class _Serialised(TypedDict):
    """What we read of a tokenizer.json."""

    model: dict[str, Any]
    added_tokens: list[dict[str, Any]]


def _any_of(words: Iterable[str]) -> str:
    """A pattern for the longest of some words at a place, which looks at no word that begins otherwise."""
    tree: _Tree = {}
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _pattern(tree)


def _pattern(tree: _Tree) -> str:
    branches = []
    for letter, below in tree.items():
        path = letter
        while len(below) == 1 and "" not in below:
            (step, below), *_ = below.items()
            path += step
        if letter:
            branches.append(re.escape(path) + _pattern(below))
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + "?" * ("" in tree)


def _renamed(parts: _Serialised, names: Mapping[str, str]) -> _Serialised:
    """A serialised tokenizer with other names for some tokens, and no way to spell them by their old ones."""
    model = dict(parts["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not _touches(pair, names)]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in parts["added_tokens"]]
    return {**parts, "added_tokens": added, "model": model}


def _touches(pair: str | Sequence[str], names: Mapping[str, str]) -> bool:
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left in names or right in names or left + right in names
