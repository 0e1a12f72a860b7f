"""Text of users never becomes a control token, and all other ids are those of the tokenizer, one for one."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atesd.config import ModelConfig
from atesd.errors import ModelError
from atesd.models.control_tokens import ControlTokens, _any_of
from atesd.models.fetch import smollm2_folder
from atesd.models.prompts import PromptEncoder
from small_tokenizers import ADDED, SPECIAL, byte_level, finished, sentencepiece, unigram, word_piece
from tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
# No line break between the user's text and the template's: merges cross that border.
TIGHT = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }}says"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)

TOKENIZERS = {
    "bytes": byte_level(),
    "bytes that take the spaces beside": byte_level(lstrip=True, rstrip=True),
    "whole words only": byte_level(single_word=True),
    "sentencepiece": sentencepiece(),
    "unigram": unigram(),
    "wordpiece": word_piece(),
}
ENCODERS: dict[tuple[str, str], PromptEncoder] = {}
for name, tokenizer in TOKENIZERS.items():
    for title, template in (("chatml", CHATML), ("tight", TIGHT)):
        tokenizer.chat_template = template
        ENCODERS[name, title] = PromptEncoder(tokenizer, ModelConfig(path=name))

WORDS = st.sampled_from(
    ["the", " ", "\n", "user", " says", "<", "|", ">", "im_end", "1 + 1", "é", "s>", "</", "\U0001f600"]
)
HARMLESS = st.lists(WORDS, max_size=12).map("".join).filter(lambda text: not any(t in text for t in SPECIAL + ADDED))
HOSTILE = st.lists(WORDS | st.sampled_from([*SPECIAL, *ADDED, "<THINK>", "<|im_", "end|>"]), max_size=12).map("".join)


def _of_the_template(which: tuple[str, str]) -> list[list[int]]:
    return [control_among(which[0], ENCODERS[which].student(text)) for text in ("1", " ", " 1", "1 ", " 1 ")]


def control_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.content in SPECIAL + ADDED}


def control_among(name: str, ids: tuple[int, ...]) -> list[int]:
    return [i for i in ids if i in control_ids(TOKENIZERS[name])]


@pytest.mark.parametrize("which", ENCODERS, ids=" ".join)
@settings(max_examples=60, deadline=None)
@given(text=HARMLESS)
def test_a_text_that_spells_no_control_token_has_the_ids_of_the_whole_rendering(which, text):
    encoder, tokenizer = ENCODERS[which], TOKENIZERS[which[0]]
    rendering = encoder.student_text(text)
    assert encoder.student(text) == tuple(tokenizer(rendering, add_special_tokens=False).input_ids)
    assert encoder.completion(text)[:-1] == tuple(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("which", ENCODERS, ids=" ".join)
@settings(max_examples=60, deadline=None)
@given(text=HOSTILE)
def test_the_control_tokens_of_a_context_are_those_around_a_harmless_text(which, text):
    encoder = ENCODERS[which]
    if which[0] == "whole words only":
        # Whether <think> beside a letter is one token is up to the letter: right or refused.
        with contextlib.suppress(ModelError):
            assert control_among(which[0], encoder.student(f" {text} ")) in _of_the_template(which)
        return
    assert control_among(which[0], encoder.student(text)) == control_among(which[0], encoder.student("1 + 1"))
    assert encoder.students([text, "a"]) == [encoder.student(text), encoder.student("a")]
    assert control_among(which[0], encoder.completion(text)[:-1]) == []


@settings(max_examples=60, deadline=None)
@given(text=HOSTILE)
def test_nothing_of_the_text_is_lost(text):
    # Byte-level tokens decode to what they were made of.
    for title in ("chatml", "tight"):
        encoder = ENCODERS["bytes", title]
        assert TOKENIZERS["bytes"].decode(encoder.student(text)) == encoder.student_text(text)
        assert TOKENIZERS["bytes"].decode(encoder.completion(text)[:-1]) == text


@settings(max_examples=60, deadline=None)
@given(text=HOSTILE)
def test_the_ids_of_bytes_are_those_of_the_parts(text):
    # Without merges or white-space rules a token is a byte: ids can be written down part by part.
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = finished(tokenizer)
    fast.chat_template = CHATML
    symbols = {byte: fast.convert_tokens_to_ids(fast.tokenize(chr(byte)))[0] for byte in range(128)}

    def of(part: str) -> list[int]:
        return [symbols[b] if b < 128 else fast.convert_tokens_to_ids(_symbol(b)) for b in part.encode()]

    start, end, think, unthink = fast.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    expected = [start, *of(f"user\n{text}"), end, *of("\n"), start, *of("assistant\n"), think, *of("\n\n"), unthink]
    assert PromptEncoder(fast, ModelConfig()).student(text) == (*expected, *of("\n\n"))


def _symbol(byte: int) -> str:
    """What byte-level BPE calls a byte above 127: itself, or for 127..160 and 173 a letter from 256 + 33 on."""
    hidden = [*range(33), *range(127, 161), 173]
    return chr(256 + hidden.index(byte)) if byte in hidden else chr(byte)


@settings(max_examples=40, deadline=None)
@given(text=HOSTILE)
def test_without_a_template_all_of_a_context_is_text(text):
    tokenizer = TOKENIZERS["bytes"]
    ids = PromptEncoder(tokenizer, ModelConfig(chat_template=False, system_prompt="<s>")).student(text)
    assert control_among("bytes", ids) == []
    assert tokenizer.decode(ids) == f"<s>\n\n{text}"


def test_a_control_token_that_only_the_border_spells_is_none():
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}x<|im_{{ m.content }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    ids = PromptEncoder(tokenizer, ModelConfig()).student("end|>")
    end, think = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    assert [i for i in ids if i in control_ids(tokenizer)] == [end, think]
    assert tokenizer.decode(ids) == "x<|im_end|><|im_end|><think>"


def test_a_template_that_looks_at_the_text_sees_no_control_token_in_it():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{% if '<think>' not in messages[-1].content %}<think>{% endif %}!{% endif %}"
    )
    encoder = PromptEncoder(tokenizer, ModelConfig())
    assert encoder.student_text("a <think>") == "a <think><think>!"
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert encoder.student("a <think>").count(think) == 1


def test_a_system_prompt_is_text_as_well():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    ids = PromptEncoder(tokenizer, ModelConfig(system_prompt="<|im_end|>")).student("a")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # of the system's turn and of the user's


@pytest.mark.parametrize(
    "token", ["\n\n", "    ", "photosynthesis", "\N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE EIGHTH BLOCK}"]
)
def test_added_tokens_of_white_space_or_letters_are_ordinary_text(token):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    tokenizer.chat_template = CHATML.replace("\n\n", "\n")
    encoder = PromptEncoder(tokenizer, ModelConfig())
    assert encoder.student(f"a{token}b") == tuple(tokenizer(encoder.student_text(f"a{token}b")).input_ids)
    assert not encoder.spells_control_token(token)


@pytest.mark.parametrize("token", ["[INST]", "<tool_call>", "◁think▷", "<｜User｜>", "<|reserved_17|>"])
def test_any_other_added_token_is_a_control_token(token):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(token, special=False)])
    tokenizer.chat_template = CHATML
    encoder = PromptEncoder(tokenizer, ModelConfig())
    assert encoder.spells_control_token(f"a{token}b")
    assert tokenizer.convert_tokens_to_ids(token) not in encoder.student(f"a{token}b")


def test_private_and_phoenician_letters_of_a_text_are_kept_or_refused():
    encoder = ENCODERS["bytes", "chatml"]
    kept = "<think>\U000f0000\U000f8001\U00010900"
    assert TOKENIZERS["bytes"].decode(encoder.completion(kept)[:-1]) == kept
    with pytest.raises(ModelError, match="Phoenician letters"):
        encoder.completion("<think>" + "\U00010900" * 12)
    with pytest.raises(ModelError, match="private characters"):
        encoder.completion("<think>\U000f0000\U000f8000\U00100000\U00108000")


def test_a_word_level_tokenizer_reads_its_end_token_in_a_text_as_unknown():
    encoder = PromptEncoder(tiny_tokenizer(), ModelConfig())
    assert encoder.student("1 <end> 2") == (3, *tiny_tokenizer()("1 <unk> 2").input_ids, 4)
    assert encoder.completion("1 <end>") == (*tiny_tokenizer()("1 <unk>").input_ids, 1)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=8), text=st.text("ab<", max_size=20))
def test_the_pattern_finds_the_longest_word_first(words, text):
    found = re.search(_any_of(words), text)
    starts = [i for i in range(len(text)) if any(text.startswith(word, i) for word in words)]
    if not starts:
        assert found is None
    else:
        longest = max((word for word in words if text.startswith(word, starts[0])), key=len)
        assert (found.start(), found.group()) == (starts[0], longest)


def test_thousands_of_added_tokens_are_searched_in_one_pass():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(f"<unused{i}>") for i in range(6000)])
    control = ControlTokens(tokenizer, "")
    assert control.spelled_in("a" * 10_000 + "<unused5999>")
    assert not control.spelled_in("<unused6000> <unused" * 1000)


@pytest.mark.real_model
@settings(max_examples=150, deadline=None)
@given(text=HOSTILE)
def test_smollm2_keeps_its_ids_and_its_control_tokens(text):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder(), local_files_only=True)
    encoder = PromptEncoder(tokenizer, ModelConfig())
    ids, rendering = encoder.student(text), encoder.student_text(text)
    assert tokenizer.decode(ids) == rendering
    if not encoder.spells_control_token(text):
        assert ids == tuple(tokenizer(rendering).input_ids)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert [i for i in ids if i in special] == [i for i in encoder.student("1") if i in special]
