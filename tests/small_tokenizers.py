"""Small tokenizers of the kinds that models come with, each with special and with other added tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]"]
ADDED = ["<think>", "</think>", "<|tool|>"]
CORPUS = [
    "the end of a turn: user says 1 + 1 = 2 <think> \n\nis it?</think>",
    "system user assistant\n",
    "a < b | c > d",
]


def finished(tokenizer: Tokenizer, **flags: bool) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, **flags) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, **flags) for t in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_level(**flags: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE with some merges, such as GPT-2 and Qwen have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer, **flags)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama 2: a mark for spaces that is put before each stretch of text, bytes for unknown characters.

    Its merges can spell the control tokens <s> and </s>, which are in the vocabulary.
    """
    letters = sorted({*"".join(CORPUS), "\N{LOWER ONE EIGHTH BLOCK}", *"<>/s"} - {" "})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "</", "s>", "th", "the", "us"]
    merges = [("<", "/"), ("s", ">"), ("t", "h"), ("th", "e"), ("u", "s"), ("<", "s>"), ("</", "s>")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\N{LOWER ONE EIGHTH BLOCK}"), normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")]
    )
    return finished(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """Its vocabulary holds </s>, with the best score of all: any text that spells it would become it."""
    letters = sorted({*"".join(CORPUS), "\N{LOWER ONE EIGHTH BLOCK}", *"<>/s"} - {" ", "\n"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in letters), ("says", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return finished(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """Like BERT: text is lower-cased, and so <THINK> is read as the normalised token <think>."""
    letters = sorted(set("".join(CORPUS).lower()) - {" ", "\n"})
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", *letters, *(f"##{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return finished(tokenizer)
