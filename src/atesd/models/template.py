"""Chat templates: programs of a model folder, rendered in jinja's sandbox, within bounds, and on a fixed day.

What a template may do is what transformers lets it do, with two differences: `strftime_now` tells the day that it is
given, so that contexts do not change at midnight, and a rendering that takes too many steps or grows too large stops
with `RenderingError`. Loops, calls and operators are counted; what a filter does inside is not. So a template is first
rendered by `rendered_apart`, in a process of its own with little time and memory.

This file imports nothing of the package: run as a program, it is that process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict

import jinja2
from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, str]]
MOST_STEPS = 1_000_000  # turns of loops and calls in one rendering; a long conversation takes thousands
MOST_CHARACTERS = 20_000_000  # of a text, items of a list or bits of a number that an operator makes
SECONDS, MEGABYTES = 5, 1024  # what the first rendering of a template may take
_LARGE_WIDTH = re.compile(r"\d{7,}|\*")


class RenderingError(Exception):
    """A template that cannot be compiled or rendered; the message says why, on one line."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """What to render: the conversation, whether the assistant's turn is opened, the template's variables, the day."""

    messages: Messages
    prompt: bool
    variables: Mapping[str, object]
    date: str


class _Wanted(TypedDict):
    """A `Rendering` as it travels to the process that renders it."""

    messages: Messages
    prompt: bool
    variables: Mapping[str, object]
    date: str


class ChatTemplate:
    """A compiled template. Raises `RenderingError` for one that is not valid jinja."""

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        with _faults():
            tree = _counted(self._environment.parse(source))
            self._template = self._environment.from_string(tree)
        self.is_random = _is_random(tree)

    def render(self, wanted: Rendering) -> str:
        """The text of a conversation. Raises `RenderingError` if the template fails or exceeds its bounds."""
        self._environment.begin(datetime.date.fromisoformat(wanted.date))
        conversation = {"messages": wanted.messages, "tools": None, "documents": None}
        with _faults():
            return self._template.render(**wanted.variables, **conversation, add_generation_prompt=wanted.prompt)


def rendered_apart(source: str, wanted: Sequence[Rendering], seconds: int = SECONDS) -> list[str | RenderingError]:
    """The text of each conversation, or its fault, from a process that may take `seconds` of CPU and `MEGABYTES`.

    Raises `RenderingError` if the template is not valid, draws random numbers, or takes more than it may.
    """
    task = json.dumps({"source": source, "wanted": [asdict(one) for one in wanted]})
    command = [sys.executable, "-P", __file__, str(seconds)]
    try:
        done = subprocess.run(command, input=task.encode(), capture_output=True, check=False, timeout=20 * seconds)
    except subprocess.TimeoutExpired:
        raise RenderingError(f"it is not rendered after {20 * seconds} seconds") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["the process died"]
        raise RenderingError(f"one rendering takes more than {seconds} s or {MEGABYTES} MB ({said[0]})")
    reply = json.loads(done.stdout)
    if isinstance(reply, str):
        raise RenderingError(reply)
    return [text if text is not None else RenderingError(fault) for text, fault in reply]


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with transformers' additions, a count of steps and a fixed day."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation])
        self.filters |= {"tojson": _to_json, "counted": self._each, "measured": _measured}
        self.globals |= {"raise_exception": _raise, "strftime_now": self._now}
        self._steps, self._day = 0, datetime.date.min

    def begin(self, day: datetime.date) -> None:
        """Start a rendering: no step is taken yet."""
        self._steps, self._day = 0, day

    def call(self, context: Context, called: object, /, *arguments: object, **named: object) -> object:
        """What the sandbox calls for every call in a template."""
        self._step()
        return _measured(super().call(context, called, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """An operator, after a look at how large its result will be."""
        if _size_after(operator, left, right) > MOST_CHARACTERS:
            raise RenderingError(f"'{operator}' would make more than {MOST_CHARACTERS:,} characters, items or bits")
        return super().call_binop(context, operator, left, right)

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise RenderingError(f"it takes more than {MOST_STEPS:,} steps")

    def _each(self, values: Iterable[object]) -> Iterator[object]:
        for value in values:
            self._step()
            yield value

    def _now(self, format: str) -> str:
        return datetime.datetime.combine(self._day, datetime.time()).strftime(format)


class _Generation(ext.Extension):
    """`{% generation %}`, which marks what an assistant wrote: its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 jinja's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """Whatever a template raises, as a `RenderingError` of one line."""
    try:
        yield
    except RenderingError:
        raise
    except Exception as error:
        raise RenderingError(_in_words(error)) from None


def _in_words(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"


def _counted(tree: nodes.Template) -> nodes.Template:
    """The tree with every loop counted and every concatenation measured."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
    for joined in list(tree.find_all(nodes.Concat)):
        joined.nodes = [nodes.Filter(one, "measured", [], [], None, None, lineno=one.lineno) for one in joined.nodes]
    return tree


def _is_random(tree: nodes.Template) -> bool:
    """Whether it draws random numbers, which would make another context of the same message."""
    drawn = any(one.name == "random" for one in tree.find_all(nodes.Filter))
    return drawn or any(one.name == "lipsum" and one.ctx == "load" for one in tree.find_all(nodes.Name))


def _size_after(operator: str, left: object, right: object) -> int:
    """At most how large the result is, in characters, items or bits."""
    if operator == "%":
        return MOST_CHARACTERS + 1 if isinstance(left, str) and _LARGE_WIDTH.search(left) else 0
    if operator == "**":
        return _size(left) * right if isinstance(left, int) and isinstance(right, int) else 0
    if operator == "+":
        return _size(left) + _size(right)
    if isinstance(left, int) and isinstance(right, int):
        return _size(left) + _size(right)
    times, whole = (left, right) if isinstance(left, int) else (right, left)
    return _size(whole) * times if isinstance(times, int) else 0


def _size(value: object) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | list | tuple) else 0


def _measured(value: object) -> object:
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        raise RenderingError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")
    return value


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limit(seconds: int) -> None:
    """Little time and memory for this process; memory on Linux only, other systems do not enforce it."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES * 2**20, MEGABYTES * 2**20))


def _replies(source: str, wanted: Sequence[_Wanted]) -> str | list[tuple[str | None, str]]:
    try:
        template = ChatTemplate(source)
    except RenderingError as fault:
        return str(fault)
    if template.is_random:
        return "it draws random numbers (random, lipsum), so that no context could be written twice; take them out"
    return [_reply(template.render, Rendering(**one)) for one in wanted]


def _reply(render: Callable[[Rendering], str], wanted: Rendering) -> tuple[str | None, str]:
    try:
        return render(wanted), ""
    except RenderingError as fault:
        return None, str(fault)


if __name__ == "__main__":
    task = json.loads(sys.stdin.buffer.read())
    _limit(int(sys.argv[1]))
    sys.stdout.write(json.dumps(_replies(task["source"], task["wanted"])))
