"""From messages to token ids and back: the only file that touches a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

from transformers import PreTrainedTokenizerBase

from atesd.config import ModelConfig
from atesd.errors import ModelError
from atesd.models.control_tokens import ControlTokens, Mask, ids_of
from atesd.models.conversation import QUESTION, Conversation, template_source
from atesd.records import Problem

_TEXTS_KEPT = 512  # probes and answers are read again every few updates, between the contexts of the batches
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 16  # tokens


class PromptEncoder:
    """Writes the student's and the teacher's contexts; the two may use different chat-template options.

    The control tokens of a context are the template's: a text that spells one, in a problem, a reference or a setting,
    is read as text. `end_ids` are the tokens that end a completion (default: the tokenizer's end token and the one with
    which the template ends a turn). Raises `ConfigError` for an option that the template does not know, which jinja
    would ignore, and `ModelError` for a template that fails or cannot be right (`conversation.py`).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, end_ids: frozenset[int] | None = None
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._tokens = lru_cache(_TEXTS_KEPT)(self._tokenise)
        self._apart = lru_cache(_TEXTS_KEPT)(self._read_apart)
        self._control = ControlTokens(tokenizer, template_source(tokenizer, config))
        self._student = Conversation(tokenizer, config, config.student_template, "model.student_template")
        self._teacher = Conversation(tokenizer, config, config.teacher_template, "model.teacher_template")
        self._written = {reader: self._control_tokens_of(reader) for reader in (self._student, self._teacher)}
        self._turn_end = turn_end_id(tokenizer, self._control, self._student.closing)
        self._end_ids = end_ids if end_ids is not None else frozenset({int(tokenizer.eos_token_id), self._turn_end})

    def student_text(self, message: str) -> str:
        """The student's context as the model reads it, up to where its completion begins."""
        return self._text_of(self._student, message)

    def teacher_text(self, message: str) -> str:
        """The teacher's context as the model reads it, up to where the completion begins."""
        return self._text_of(self._teacher, message)

    def student(self, message: str) -> tuple[int, ...]:
        """Token ids of `student_text`."""
        return self._encode(self._student, message)

    def teacher(self, message: str) -> tuple[int, ...]:
        """Token ids of `teacher_text`."""
        return self._encode(self._teacher, message)

    def students(self, messages: Sequence[str]) -> list[tuple[int, ...]]:
        """`student` of many messages, tokenised together."""
        return self._encode_all(self._student, messages)

    def teachers(self, messages: Sequence[str]) -> list[tuple[int, ...]]:
        """`teacher` of many messages, tokenised together."""
        return self._encode_all(self._teacher, messages)

    def completion(self, text: str) -> tuple[int, ...]:
        """A given text, such as a reference, as the ids of a completion: its tokens and the end of the turn.

        That end is the token with which the template ends an assistant's message, else the tokenizer's end token.
        """
        ids = self._tokens(text)
        if self._control.spelled_in(text) or self._control.among(ids):
            ids = self._control.read_plain(text)
        return (*ids, self._turn_end)

    def spells_control_token(self, text: str) -> bool:
        """Whether a text spells a control token of the tokenizer, such as `<|im_end|>`; it is read as text."""
        return self._control.spelled_in(text)

    def notes(self) -> Iterator[str]:
        """What a user should know of the two contexts: where they end, and the date that they print."""
        if self._config.chat_template:
            yield _ends_line(self._student.opening, self._teacher.opening)
        if self._student.prints_date or self._teacher.prints_date:
            yield f"the chat template prints a date: model.template_date {self._config.template_date}, on every day"

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

    def _text_of(self, reader: Conversation, message: str) -> str:
        return self._apart(reader, message)[0] if self._is_spelled(message) else self._render(reader, message)

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

    def _render(self, reader: Conversation, message: str) -> str:
        return reader.render(message, self._config.system_prompt)

    def _encode(self, reader: Conversation, message: str) -> tuple[int, ...]:
        return self._checked(reader, message, self._tokens(self._render(reader, message)))

    def _encode_all(self, reader: Conversation, messages: Sequence[str]) -> list[tuple[int, ...]]:
        if not messages:
            return []
        texts = [self._render(reader, message) for message in messages]
        many = ids_of(self._tokenizer, texts)
        return [self._checked(reader, message, tuple(ids)) for message, ids in zip(messages, many, strict=True)]

    def _checked(self, reader: Conversation, message: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The ids of a context, read again if a control token in them may not be the template's.

        A template writes its own begin token; plain text gets one if the tokenizer adds it.
        """
        other = self._control.among(ids) != self._written[reader] and not self._control.depend_on_neighbours
        if other or self._is_spelled(message):
            ids = self._apart(reader, message)[1]
        return ids if self._config.chat_template else (*self._begin(), *ids)

    def _is_spelled(self, message: str) -> bool:
        system = self._config.system_prompt
        return self._control.spelled_in(message) or (system is not None and self._control.spelled_in(system))

    def _read_apart(self, reader: Conversation, message: str) -> tuple[str, tuple[int, ...]]:
        """Text and ids of a context in which only the template writes control tokens."""
        masked, mask = self._masked(reader, message)
        return mask.taken_off(masked), self._control.read(masked, mask)

    def _masked(self, reader: Conversation, message: str) -> tuple[str, Mask]:
        """The context with the letters masked of which control tokens in message and system prompt are made.

        All letters that occur in such tokens are masked, so that none arises at a border either; only those of the
        tokens that are spelled, where the template reads the message and would write something else.
        """
        system = self._config.system_prompt
        mask = self._control.mask_for([message, system or ""])
        plain, masked = self._render(reader, message), ""
        for wholly in (True, False):
            shown = None if system is None else mask.put_on(system, wholly=wholly)
            masked = reader.render(mask.put_on(message, wholly=wholly), shown)
            if mask.taken_off(masked) == plain:
                break
        return masked, mask

    def _control_tokens_of(self, reader: Conversation) -> tuple[int, ...]:
        """The control tokens that the template writes around any message."""
        return self._control.among(self._tokenise(self._masked(reader, QUESTION)[0]))

    def _begin(self) -> tuple[int, ...]:
        begin = self._tokenizer.bos_token_id
        return (int(begin),) if begin is not None and begin in self._tokenizer("").input_ids else ()

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(ids_of(self._tokenizer, [text])[0])

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


def _ends_line(student: str, teacher: str) -> str:
    shown = [repr(end) if end else "the message itself" for end in (student, teacher)]
    ends = f"student's context ends with {shown[0]}, teacher's with {shown[1]}"
    if student == teacher:
        return f"{ends}: the same"
    return (
        f"{ends}: they differ, so that the first tokens disagree by template, not by knowledge; align "
        "model.student_template and model.teacher_template, unless that is what you study"
    )


def spelling_control_tokens(problems: Sequence[Problem], encoder: PromptEncoder) -> int:
    """How many problems spell a control token of the tokenizer in text, reference or answer."""
    texts = ((problem.text, problem.reference, problem.answer) for problem in problems)
    return sum(any(map(encoder.spells_control_token, some)) for some in texts)


def control_line(problems: Sequence[Problem], encoder: PromptEncoder) -> str:
    """The line that says so to a user."""
    count = spelling_control_tokens(problems, encoder)
    return f"problems that spell a control token of the tokenizer: {count} of {len(problems)} (it is read as text)"


def turn_end_id(tokenizer: PreTrainedTokenizerBase, control: ControlTokens, closing: str) -> int:
    """The token that ends an assistant's message, given what the template writes after one."""
    ids = ids_of(tokenizer, [closing.lstrip()])[0]
    return int(ids[0]) if ids and ids[0] in control.ids else int(tokenizer.eos_token_id)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> int:
    """The token with which the student's chat template ends a turn; the tokenizer's end token if that is not known."""
    try:
        reader = Conversation(tokenizer, config, config.student_template, "model.student_template")
    except ModelError:
        return int(tokenizer.eos_token_id)  # the encoder will say what is wrong
    return turn_end_id(tokenizer, ControlTokens(tokenizer, template_source(tokenizer, config)), reader.closing)
