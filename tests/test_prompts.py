"""Chat templates, begin and end tokens, and token texts that join to the decoded text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from atesd.config import ModelConfig
from atesd.errors import ConfigError, ModelError
from atesd.models.prompts import PromptEncoder
from tiny import tiny_tokenizer

WORDS = tiny_tokenizer()


def encoder(**settings: object) -> PromptEncoder:
    return PromptEncoder(WORDS, ModelConfig.model_validate(settings))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as byte-level BPE falls back to; adds a begin token and an end token to what it reads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BYTES = PromptEncoder(byte_tokenizer(), ModelConfig(chat_template=False))


def test_the_context_is_the_rendered_template_with_a_generation_prompt():
    assert encoder().student_text("1 + 2") == "<user> 1 + 2 <assistant>"
    assert encoder().student("1 + 2") == (3, *WORDS("1 + 2").input_ids, 4)


def test_student_and_teacher_have_their_own_options():
    prompts = encoder(student_template={"enable_thinking": False}, teacher_template={"enable_thinking": True})
    assert prompts.student_text("a") == "<user> a <assistant>"
    assert prompts.teacher_text("a") == "<user> a <assistant> <think>"
    assert prompts.teacher("a") == (*prompts.student("a"), 6)


def test_many_messages_are_read_as_each_alone():
    words = encoder(teacher_template={"enable_thinking": True}, system_prompt="c")
    messages = ["a b", "1 + 2", "a b c d"]
    for prompts in (words, BYTES):
        assert prompts.students(messages) == [prompts.student(message) for message in messages]
        assert prompts.teachers(messages) == [prompts.teacher(message) for message in messages]
        assert prompts.students([]) == []


def test_the_system_prompt_comes_first_in_both_contexts():
    prompts = encoder(system_prompt="b c")
    assert prompts.student_text("a") == prompts.teacher_text("a") == "<system> b c <user> a <assistant>"


def test_without_a_template_the_message_is_read_as_it_is():
    assert encoder(chat_template=False).student_text("a b") == "a b"
    assert encoder(chat_template=False, system_prompt="c").teacher_text("a b") == "c\n\na b"


def test_plain_text_gets_the_begin_token_of_the_tokenizer_and_no_end_token():
    assert BYTES.student("ab") == (0, *byte_tokenizer()("ab", add_special_tokens=False).input_ids)
    assert encoder(chat_template=False).student("a b") == tuple(WORDS("a b").input_ids)


def test_a_template_writes_its_own_begin_token():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert PromptEncoder(tokenizer, ModelConfig()).student("ab") == BYTES.student("ab")


@pytest.mark.parametrize("reader", ["student", "teacher"])
def test_an_option_that_the_template_does_not_know_is_named(reader):
    with pytest.raises(ConfigError, match=rf"model.{reader}_template.enable_thinkin: .* no option of this name"):
        encoder(**{f"{reader}_template": {"enable_thinkin": True}})


def test_an_option_that_is_ours_to_set_is_refused():
    with pytest.raises(ConfigError, match=r"student_template.add_generation_prompt"):
        encoder(student_template={"add_generation_prompt": False})


def test_options_without_a_template_are_refused():
    with pytest.raises(ConfigError, match=r"teacher_template: enable_thinking: without a chat template"):
        encoder(chat_template=False, teacher_template={"enable_thinking": True})


def test_a_template_that_refuses_the_system_prompt_says_so_at_once():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    PromptEncoder(tokenizer, ModelConfig())
    with pytest.raises(ModelError, match=r"no system role; it may not allow model.system_prompt"):
        PromptEncoder(tokenizer, ModelConfig(system_prompt="a"))


def test_a_reference_becomes_a_completion_that_decodes_to_itself():
    prompts = encoder()
    assert prompts.completion("1 + 2") == (*WORDS("1 + 2").input_ids, 1)
    assert prompts.decode(prompts.completion("1 + 2")) == "1 + 2"


def test_only_the_last_end_token_is_dropped_and_other_special_tokens_stay_visible():
    prompts = PromptEncoder(WORDS, ModelConfig(), end_ids=frozenset({1, 5}))
    assert prompts.decode([7, 1, 4, 8, 5]) == "0 <end> <assistant> 1"
    assert prompts.decode([7, 8]) == "0 1"
    assert prompts.decode([]) == ""


def test_pieces_of_words_carry_their_spaces():
    assert encoder().pieces([7, 17, 8, 1]) == ["0", " +", " 1", " <end>"]


def test_a_character_belongs_to_the_token_that_completes_it():
    # The euro sign is 3 bytes: its first two tokens show nothing yet.
    assert BYTES.pieces(BYTES.completion("a€b")) == ["a", "", "", "€", "b", "</s>"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    assert BYTES.pieces(BYTES.completion("a€")[:3]) == ["a", "", "\ufffd"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_bytes_survive_the_way_into_tokens_and_back(text):
    ids = BYTES.completion(text)
    assert BYTES.decode(ids) == text
    pieces = BYTES.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text + "</s>"
