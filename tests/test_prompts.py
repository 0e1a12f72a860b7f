"""Chat templates, begin and end tokens, and token texts that join to the decoded text."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges over the borders of characters."""
    euro = ["â", "Ĥ", "¬"]  # the symbols of its three bytes
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), (euro[1], euro[2]), ("ab", euro[0]), ("¬", "a")]
    words = ["</s>", *alphabet, *(one + other for one, other in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As of Llama 2: words that begin with a blank, and bytes for what is no word."""
    words = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", "▁▁", "�", "€"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """As of T5: pieces of words, without bytes, and one whose text is the sign of an unfinished character."""
    words = [
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -1.0),
        ("▁a", -1.0),
        ("b", -1.0),
        ("€", -1.0),
        ("�", -1.0),
        ("<0x61>", -2.0),
    ]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """As of BERT: pieces that go on begin with ##."""
    words = ["</s>", "<unk>", "a", "##a", "##b", "�", "##�", "€", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


MANY = {
    make.__name__: PromptEncoder(make(), ModelConfig(chat_template=False))
    for make in (
        tiny_tokenizer,
        byte_tokenizer,
        bpe_tokenizer,
        byte_fallback_tokenizer,
        unigram_tokenizer,
        wordpiece_tokenizer,
    )
}


def pieces_by_definition(prompts: PromptEncoder, ids: Sequence[int]) -> list[str]:
    """Each token with all before it that have not been given out, and the group before them, decoded anew."""

    def text(some: Sequence[int]) -> str:
        return prompts.decode([*some, prompts.completion("")[-1]])

    pieces: list[str] = []
    known, done = 0, 0
    for i in range(len(ids)):
        before, now = text(ids[known:done]), text(ids[known : i + 1])
        if now.endswith("�") and i + 1 < len(ids):
            pieces.append("")
        else:
            pieces.append(now[len(before) :])
            known, done = done, i + 1
    return pieces


def sampled(prompts: PromptEncoder) -> st.SearchStrategy[list[int]]:
    """Any tokens, and long runs of bytes that are no text, as a model at a high temperature writes them."""
    size = len(prompts._tokenizer)
    marked = prompts.completion("a b €\x80ab � 🙂")
    some = st.sampled_from([*marked, *range(size)]) | st.sampled_from(marked)
    runs = st.tuples(st.lists(some, min_size=1, max_size=3), st.integers(1, 40)).map(lambda run: run[0] * run[1])
    return st.lists(runs | st.lists(some, max_size=6), max_size=6).map(
        lambda parts: [i for part in parts for i in part]
    )


@pytest.mark.parametrize("name", MANY)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_are_those_of_their_definition(name, data):
    prompts = MANY[name]
    ids = data.draw(sampled(prompts))
    assert prompts.pieces(ids) == pieces_by_definition(prompts, ids)


@pytest.mark.parametrize("name", MANY)
def test_pieces_of_bytes_that_never_become_a_character_take_linear_time(name):
    prompts = MANY[name]
    vocabulary = prompts._tokenizer.get_vocab()
    wrong = next(vocabulary[word] for word in ("<0xFF>", "ÿ", "�", "<unk>") if word in vocabulary)
    letter = next(vocabulary[word] for word in ("<0x61>", "a", "▁a") if word in vocabulary)
    for ids in ([wrong] * 8000, [wrong] + [letter] * 8000):
        started = time.process_time()
        assert len(prompts.pieces(ids)) == len(ids)
        assert time.process_time() - started < 4  # seconds; about 0.3, and minutes if quadratic
