"""From messages to token ids and back: the only file that touches a chat template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from atesd.config import ModelConfig
from atesd.errors import ConfigError, ModelError

Options = Mapping[str, Any]
_TEXTS_KEPT = 512  # probes and answers are read again every few updates, between the contexts of the batches
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 16  # tokens


class PromptEncoder:
    """Writes the student's and the teacher's contexts; the two may use different chat-template options.

    `end_ids` are the tokens that end a completion (default: the tokenizer's end token). Raises `ConfigError` for an
    option that the template does not know, which jinja would ignore, and `ModelError` for a template that fails.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, end_ids: frozenset[int] | None = None
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._tokens = lru_cache(_TEXTS_KEPT)(self._tokenise)
        self._end_ids = end_ids if end_ids is not None else frozenset({int(tokenizer.eos_token_id)})
        for reader, options in (("student", config.student_template), ("teacher", config.teacher_template)):
            self._check_options(f"model.{reader}_template", options)
            self._render("1 + 1 = ?", options)

    def student_text(self, message: str) -> str:
        """The student's context as the model reads it, up to where its completion begins."""
        return self._render(message, self._config.student_template)

    def teacher_text(self, message: str) -> str:
        """The teacher's context as the model reads it, up to where the completion begins."""
        return self._render(message, self._config.teacher_template)

    def student(self, message: str) -> tuple[int, ...]:
        """Token ids of `student_text`."""
        return self._encode(self.student_text(message))

    def teacher(self, message: str) -> tuple[int, ...]:
        """Token ids of `teacher_text`."""
        return self._encode(self.teacher_text(message))

    def students(self, messages: Sequence[str]) -> list[tuple[int, ...]]:
        """`student` of many messages, tokenised together."""
        return self._encode_all([self.student_text(message) for message in messages])

    def teachers(self, messages: Sequence[str]) -> list[tuple[int, ...]]:
        """`teacher` of many messages, tokenised together."""
        return self._encode_all([self.teacher_text(message) for message in messages])

    def completion(self, text: str) -> tuple[int, ...]:
        """A given text, such as a reference, as the ids of a completion: its tokens and the end token."""
        return (*self._tokens(text), int(self._tokenizer.eos_token_id))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion without its end token; other special tokens stay visible."""
        return self._text(ids[:-1] if ids and ids[-1] in self._end_ids else ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds. Joined they are the text of all tokens, the end token included.

        A character whose bytes are spread over several tokens belongs to the last of them; the others are empty. Takes
        time linear in the number of tokens.
        """
        pieces: list[str] = []
        known, done = 0, 0  # ids[known:done] is context whose text has been given out
        for i in range(len(ids)):
            if i + 1 < len(ids) and self._is_unfinished(ids, known, done, i + 1):
                pieces.append("")
            else:
                pieces.append(self._text(ids[known : i + 1])[len(self._text(ids[known:done])) :])
                known, done = done, i + 1
        return pieces

    def _is_unfinished(self, ids: Sequence[int], known: int, done: int, end: int) -> bool:
        """Whether the text of ids[known:end] ends within a character.

        Of a long stretch without an end, `_WINDOW` tokens tell: a character has four bytes at most. Only where one
        wrong byte spoils all bytes around it do more count, and then nothing but another token ends that stretch.
        """
        if end - done <= _WINDOW:
            return self._text(ids[known:end]).endswith(_UNFINISHED)
        window = ids[end - _WINDOW : end]
        if self._byte_ids.issuperset(window):
            return True
        return self._text(window).endswith(_UNFINISHED)

    def _render(self, message: str, options: Options) -> str:
        system = self._config.system_prompt
        if not self._config.chat_template:
            return message if system is None else f"{system}\n\n{message}"
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": message})
        try:
            return str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
            )
        except jinja2.TemplateError as error:
            fix = "" if system is None else "; it may not allow model.system_prompt"
            raise ModelError(f"the tokenizer's chat template fails: {error}{fix}") from None

    def _encode(self, text: str) -> tuple[int, ...]:
        """A template writes its own special tokens; plain text gets the begin token if the tokenizer adds one."""
        return (*(() if self._config.chat_template else self._begin()), *self._tokens(text))

    def _encode_all(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        begin = () if self._config.chat_template else self._begin()
        many = self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return [(*begin, *ids) for ids in many]

    def _begin(self) -> tuple[int, ...]:
        begin = self._tokenizer.bos_token_id
        return (int(begin),) if begin is not None and begin in self._tokenizer("").input_ids else ()

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        """Tokens `<0x00>` to `<0xFF>` if they stand for bytes, and one that is wrong spoils those next to it."""
        vocabulary = self._tokenizer.get_vocab()
        ids = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)]
        known = frozenset(token for token in ids if token is not None)
        wrong, letter = ids[0xFF], ids[ord("a")]
        spoils = wrong is not None and letter is not None and self._text([wrong, letter]) == 2 * _UNFINISHED
        return known if spoils else frozenset()

    def _check_options(self, setting: str, options: Options) -> None:
        if options and not self._config.chat_template:
            raise ConfigError(
                f"{setting}: {', '.join(options)}: without a chat template there are no options; remove them"
            )
        template = self._tokenizer.get_chat_template() if options else ""
        ours = inspect.signature(self._tokenizer.apply_chat_template).parameters
        for name in options:
            if name in ours:
                raise ConfigError(f"{setting}.{name}: this option is not a template's; remove it")
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ConfigError(
                    f"{setting}.{name}: the tokenizer's chat template has no option of this name; remove it"
                )
