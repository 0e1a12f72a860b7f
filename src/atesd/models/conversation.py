"""One reader's chat template with its options: checked once in a process of its own, then rendered message by message.

A template is refused (`ModelError`) that fails, draws random numbers, leaves out what the user says, or does not open
the assistant's turn. One that prints the date is told `model.template_date`.
"""

from __future__ import annotations

import datetime
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from atesd.config import ModelConfig
from atesd.errors import ConfigError, ModelError
from atesd.models.template import ChatTemplate, Messages, Rendering, RenderingError, rendered_apart

Options = Mapping[str, Any]
QUESTION, ANSWER = "Repeat 7351.", "8426"  # digits survive whatever a template does to letters
_OTHER_DAY = 500  # days after the pinned date: another day, month, year and day of the week


def template_source(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> str:
    """The template that the tokenizer uses for a conversation without tools; empty without one."""
    if not config.chat_template:
        return ""
    try:
        source = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(f"{config.path}: its chat template cannot be chosen: {_line(error)}") from None
    if not isinstance(source, str):
        raise ModelError(f"{config.path}: its chat template is {type(source).__name__}, expected text")
    return source


@final
class Conversation:
    """What one reader is shown: a message under the system prompt and the template's options.

    `setting` names the options in errors: model.student_template. Attributes: `prints_date`; `opening`, what follows
    the user's message; `closing`, what follows the assistant's ("" if the template tells neither).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, options: Options, setting: str) -> None:
        self._config, self._options, self._tokenizer = config, dict(options), tokenizer
        self._source = template_source(tokenizer, config)
        self._template: ChatTemplate | None = None
        self.prints_date, self.opening, self.closing = False, "", ""
        self._check_options(setting)
        if config.chat_template:
            self._check()

    def render(self, message: str, system: str | None) -> str:
        """The context of a message, up to where the completion begins. Raises `ModelError` if the template fails."""
        if self._template is None:
            return message if system is None else f"{system}\n\n{message}"
        try:
            return self._template.render(self._wanted(_messages(system, message), prompt=True))
        except RenderingError as fault:
            raise self._fails(fault) from None

    def _wanted(self, messages: Messages, *, prompt: bool, days: int = 0) -> Rendering:
        date = self._config.template_date + datetime.timedelta(days=days)
        variables = {**self._tokenizer.special_tokens_map, **self._options}
        return Rendering(messages, prompt, variables, date.isoformat())

    def _check(self) -> None:
        system = self._config.system_prompt
        asked = _messages(system, QUESTION)
        answered = [*asked, {"role": "assistant", "content": ANSWER}]
        wanted = [
            self._wanted(asked, prompt=True),
            self._wanted(asked, prompt=True, days=_OTHER_DAY),
            self._wanted(asked, prompt=False),
            self._wanted(answered, prompt=False),
            self._wanted(_messages(None, QUESTION), prompt=True),
        ]
        try:
            opened, other_day, unopened, whole, without_system = _rendered(self._source, _key(wanted))
            self._template = ChatTemplate(self._source)
        except RenderingError as fault:
            raise self._fails(fault) from None
        if isinstance(opened, RenderingError):
            raise self._fails(opened)
        if system is not None and opened == without_system:
            raise ModelError("model.system_prompt: the tokenizer's chat template leaves it out; remove the setting")
        if "7351" not in opened:
            raise ModelError(
                f"{self._config.path}: its chat template leaves out what the user says; mend it in the model folder"
            )
        self.prints_date = opened != other_day
        self._require_opening(opened, unopened, whole)
        self._require_as_transformers(opened, asked)
        self.opening = opened.rpartition(QUESTION)[2] if QUESTION in opened else ""
        self.closing = whole.rpartition(ANSWER)[2] if isinstance(whole, str) else ""

    def _require_opening(self, opened: str, unopened: str | RenderingError, whole: str | RenderingError) -> None:
        """The assistant's turn begins where the context ends: it is opened, or a template like Mistral's needs not."""
        if opened != unopened:
            return
        before = whole.partition(ANSWER)[0] if isinstance(whole, str) and ANSWER in whole else None
        if before is None or not before.startswith(opened.rstrip()) or before.removeprefix(opened.rstrip()).strip():
            raise ModelError(
                f"{self._config.path}: its chat template ignores add_generation_prompt, so that a completion would "
                f"begin after {opened[-40:]!r}, outside the assistant's turn; end the template with "
                "{% if add_generation_prompt %} and what opens that turn {% endif %}, or set model.chat_template: false"
            )

    def _require_as_transformers(self, opened: str, asked: Messages) -> None:
        """The same text here, in the other process and from transformers: nothing depends on where it is rendered."""
        here = self.render(QUESTION, self._config.system_prompt)
        try:
            theirs: Any = here
            if not self.prints_date:
                theirs = self._tokenizer.apply_chat_template(
                    [dict(one) for one in asked], tokenize=False, add_generation_prompt=True, **self._options
                )
        except Exception as error:  # whatever a template raises
            raise self._fails(RenderingError(_line(error))) from None
        if not here == opened == theirs:
            raise ModelError(
                f"{self._config.path}: its chat template writes another text each time it is rendered, or another one "
                "than transformers writes; mend it in the model folder"
            )

    def _fails(self, fault: RenderingError) -> ModelError:
        system = "" if self._config.system_prompt is None else "it may not allow model.system_prompt, or "
        return ModelError(
            f"{self._config.path}: the tokenizer's chat template fails: {fault}; {system}mend it in the model folder "
            "(chat_template.jinja), or set model.chat_template: false"
        )

    def _check_options(self, setting: str) -> None:
        options = self._options
        if options and not self._config.chat_template:
            raise ConfigError(
                f"{setting}: {', '.join(options)}: without a chat template there are no options; remove them"
            )
        ours = inspect.signature(self._tokenizer.apply_chat_template).parameters
        for name in options:
            if name in ours or name == "messages":
                raise ConfigError(f"{setting}.{name}: this option is not a template's; remove it")
            if not re.search(rf"\b{re.escape(name)}\b", self._source):
                raise ConfigError(
                    f"{setting}.{name}: the tokenizer's chat template has no option of this name; remove it"
                )


def _messages(system: str | None, message: str) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": message}]


def _key(wanted: Sequence[Rendering]) -> str:
    return json.dumps([[one.messages, one.prompt, one.variables, one.date] for one in wanted])


@lru_cache(64)
def _rendered(source: str, key: str) -> list[str | RenderingError]:
    """`rendered_apart`, once for each template and its options."""
    return rendered_apart(source, [Rendering(*one) for one in json.loads(key)])


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
