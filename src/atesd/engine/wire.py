"""JSON over HTTP to one server, by the standard library, with a limit on time and tries."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import final

from atesd.errors import EngineError
from atesd.text import shown

_BUSY = (429, 500, 502, 503, 504)
"""Answers after which the same request may succeed."""


class WireError(EngineError):
    """A server that gave no usable answer after all tries; another one may."""


@final
class Wire:
    """Speaks to one server. What it refuses, or does not answer in time, is an `EngineError` that names the server."""

    def __init__(self, url: str, timeout: float, retries: int, retry_wait: float) -> None:
        """`timeout` in seconds, of one try; `retry_wait` before the first repetition, twice as long before the next."""
        self.url = url.rstrip("/")
        self._timeout, self._retries, self._wait = timeout, retries, retry_wait

    def get(self, path: str) -> object:
        """What the server answers, as JSON if it is."""
        return self._ask(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict[str, object]) -> object:
        """What the server answers to a JSON body."""
        header = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        return self._ask(urllib.request.Request(self.url + path, data, header, method="POST"))

    def _ask(self, request: urllib.request.Request) -> object:
        reason = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    content = answer.read().decode("utf-8", "replace")
                return json.loads(content) if content[:1] in ("{", "[") else content
            except urllib.error.HTTPError as error:
                reason = f"answers {error.code}: {shown(error.read().decode('utf-8', 'replace'))}"
                if error.code not in _BUSY:
                    raise EngineError(f"{request.full_url}: {reason}; {_fix(error.code)}") from None
            except TimeoutError:
                reason = f"gave no answer within {self._timeout:g} s (sampling.server.timeout)"
            except urllib.error.URLError as error:
                reason = f"cannot be reached: {error.reason}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"broke off: {type(error).__name__} {error}"
        raise WireError(
            f"{request.full_url}: {reason}, {self._retries + 1} times; is it running, and is sampling.server.urls "
            "right? (atesd serve RECIPE starts one; the same command resumes the run)"
        )


def _fix(code: int) -> str:
    if code == 404:
        return (
            "it does not know this path or model: start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 "
            "for adapters, VLLM_SERVER_DEV_MODE=1 for all weights, as atesd serve prints"
        )
    return "look into the server's log"
