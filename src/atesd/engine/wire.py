"""JSON over HTTP to one server, by the standard library, with a limit on time and on repetitions."""

from __future__ import annotations

import http.client
import json
import queue
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar, final

from atesd.config import ServerSettings
from atesd.errors import EngineError
from atesd.refusals import reason
from atesd.text import visible

T = TypeVar("T")
R = TypeVar("R")

_BUSY = (429, 500, 502, 503, 504)
"""Answers after which the same request may succeed."""
_AT_ONCE = 10.0  # seconds within which a server says that it is there
_LOG = "look into the server's log; the same command then resumes the run"
_UNREACHED = (
    "is sampling.server.urls spelt right, and does the server run? `atesd serve RECIPE` starts one; the same command "
    "then resumes the run"
)
_PLAIN = "does it speak https? One that `atesd serve` started speaks http: write sampling.server.urls so"
_MOST = 400  # characters of what a server says of an error


@final
class Wire:
    """Speaks to one server, past any proxy. What it refuses, or does not answer, is an `EngineError` that names it.

    A server that is busy or fails is asked again, after a wait that doubles, and so is one whose connection broke,
    unless `forgets`: it may then have been started again, with other weights than it was given. Whoever does not
    answer in time is not asked again.
    """

    def __init__(self, url: str, options: ServerSettings, *, forgets: bool = False) -> None:
        self.url = url.rstrip("/")
        self._options, self._forgets = options, forgets
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> object:
        """What the server answers at once, as JSON if it is."""
        return self._ask(urllib.request.Request(self.url + path), min(_AT_ONCE, self._options.answer_seconds()), _LOG)

    def post(
        self, path: str, body: dict[str, object] | None = None, *, fix: str = _LOG, seconds: float | None = None
    ) -> object:
        """What the server answers to a JSON body, within `seconds`; `fix`: what to do if it refuses."""
        headers, data = {"Content-Type": "application/json"}, json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, headers, method="POST")
        return self._ask(request, seconds or self._options.answer_seconds(), fix)

    def _ask(self, request: urllib.request.Request, timeout: float, fix: str) -> object:
        url, tries = request.full_url, self._options.retries + 1
        for attempt in range(tries):
            if attempt:
                time.sleep(self._options.retry_wait * 2 ** (attempt - 1))
            try:
                with self._opener.open(request, timeout=timeout) as answer:
                    content = answer.read().decode("utf-8", "replace")
                return json.loads(content) if content[:1] in ("{", "[") else content
            except urllib.error.HTTPError as error:
                failure, advice = f"answers {error.code}: {_said(error)}", "; ".join(dict.fromkeys((fix, _LOG)))
                if error.code not in _BUSY:
                    raise EngineError(f"{url}: {failure}; {fix}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                if isinstance(cause, TimeoutError):
                    raise EngineError(
                        f"{url}: no answer within {timeout:g} s; is it overloaded, or hung? Raise "
                        "sampling.server.timeout, or start it again; the same command then resumes the run"
                    ) from None
                failure = reason(cause) if isinstance(cause, OSError) else str(cause) or type(cause).__name__
                advice = _PLAIN if isinstance(cause, ssl.SSLError) else _UNREACHED
                if self._forgets:
                    tries = attempt + 1
                    break
        raise EngineError(f"{url}: cannot be used: {failure}, {tries} time{'s' * (tries > 1)}; {advice}")


def _said(error: urllib.error.HTTPError) -> str:
    """What an answer that is an error says: its message in the words of vLLM, else its body as far as it is short."""
    try:
        text = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "(nothing more)"
    with suppress(ValueError, RecursionError):
        told = json.loads(text)
        told = told.get("error", told.get("detail", told)) if isinstance(told, dict) else told
        text = str(told.get("message", told) if isinstance(told, dict) else told)
    text = visible(" ".join(text.split()))
    return text if len(text) <= _MOST else f"{text[:_MOST]}..."


def at_once(work: Callable[[T], R], items: Sequence[T], most: int) -> list[R]:
    """The results of the work on each item, in order, at most so many at a time.

    The first failure in that order, or an interrupt, is raised without waiting for the rest: its threads are daemons,
    since a server that hangs must not keep a program from ending.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: list[Future[R]] = [Future() for _ in items]
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results[place].set_result(work(items[place]))
            except Exception as error:  # whatever it is, it is raised below; items before this one are under way
                results[place].set_exception(error)
                over.set()

    for place in range(len(items)):
        waiting.put(place)
    for _ in range(min(most, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        return [result.result() for result in results]
    finally:
        over.set()
