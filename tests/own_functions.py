"""Functions as a user may write them, right and wrong; light, since every process of a checker imports them."""

import functools
from typing import Any


def right(**_: Any) -> Any:
    return lambda completion, answer: answer in completion


class Right:
    def __init__(self, where: str = "") -> None:
        self.where = where

    def __call__(self, completion: str, answer: str) -> bool:
        return f"{self.where}{answer}" in completion


lambda_right = lambda: right()  # noqa: E731
partial_right = functools.partial(Right, where="= ")


def made_of(value: Any) -> Any:
    """A factory of a function that always gives this value."""
    return lambda **_: lambda *_: value


one, half, word, none, floats, odd = map(made_of, (1, 0.5, "unparseable", None, 0.0, "right"))


def sleepy() -> Any:
    def check(completion: str, answer: str) -> bool:  # noqa: ARG001
        while completion != "quick":
            pass
        return True

    return check


def failing() -> Any:
    def check(completion: str, answer: str) -> bool:  # noqa: ARG001
        raise KeyError("no such\nkey")

    return check


def direct(completion: str, answer: str) -> bool:
    return completion == answer


nothing_callable = 5


def lines() -> Any:
    return str.split


def kept() -> Any:
    return lambda text: text.splitlines(keepends=True)


def empty() -> Any:
    return lambda text: [text, ""]


def letters() -> Any:
    return list


def whole() -> Any:
    return lambda text: text


def raising() -> Any:
    return lambda text: 1 / 0 if "p7" in text else [text]


made_numbers = made_of([1, 2])


def shown_less(price: float = 1.0) -> Any:
    return lambda finished: finished.progress - price * finished.effective_ratio


def unbounded() -> Any:
    return lambda _: float("inf")


truth = made_of(True)


def strict() -> Any:
    return lambda finished: finished.reward + "x"
