"""A stand-in for `vllm serve`: its endpoints that a trainer needs, answered by the builtin engine, in a thread.

    with StubServer(loaded) as server:
        ServerEngine(loaded, ServerSettings(urls=[server.url], draws="keyed"))

`faults` switches on what real servers have done: `stale` accepts weights and ignores them, `down` answers 500, `busy`
does so for every other request, `slow` never answers, `breaks` drops one connection, `blind` does not see the folder,
`greedy` has no logits processor of ours, the others spoil an answer.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM

from atesd.engine.builtin import BuiltinEngine
from atesd.engine.interface import Request, SamplingParams
from atesd.errors import NonFiniteError
from atesd.models.load import LoadedModel
from atesd.models.quiet import quiet
from atesd.models.ranks import SINGLE_PROCESS


def _shortened(choice: dict[str, Any]) -> None:
    del choice["token_ids"][1:], choice["logprobs"]["token_logprobs"][1:]


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "foreign ids": lambda choice: choice["token_ids"].__setitem__(0, 10**6),
    "cut short": _shortened,
    "too many": lambda choice: choice["token_ids"].extend([8] * 500),
    "goes on": lambda choice: choice["token_ids"].__setitem__(0, 1),
    "no ids": lambda choice: choice.pop("token_ids"),
    "no logprobs": lambda choice: choice["logprobs"]["token_logprobs"].pop(),
    "aborted": lambda choice: choice.update(finish_reason="abort"),
    "nan": lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, float("nan")),
}


_ONE_AT_A_TIME = threading.Lock()  # transformers loads a model under a default device that all threads share


class StubServer:
    """One server, with the weights that `loaded` has at the start, and those that it is told to load."""

    def __init__(self, loaded: LoadedModel, name: str = "base", room: int = 4096, root: str = "") -> None:
        copied = copy.deepcopy(loaded.model)
        base = copied.unload() if isinstance(copied, PeftModel) else copied
        self._like = replace(loaded, ranks=SINGLE_PROCESS)
        self.models: dict[str, Any] = {name: base.eval()}
        self.name, self.room, self.root = name, room, root or str(base.name_or_path)
        self.faults: set[str] = set()
        self.asleep = False
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self._released = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(*stub.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if "breaks" in stub.faults:
                    stub.faults.discard("breaks")
                    self.close_connection = True
                    return
                self.answer(*stub.post(self.path, body))

            def answer(self, code: int, value: object) -> None:
                content = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        ThreadingHTTPServer.request_queue_size = 128
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def __enter__(self) -> StubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As if it was killed: nothing listens any more."""
        self._released.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def get(self, path: str) -> tuple[int, object]:
        if path == "/health":
            return (503 if "down" in self.faults else 200), {}
        if path == "/v1/models":
            adapters = [{"id": name, "parent": self.name} for name in self.models if name != self.name]
            return 200, {"data": [{"id": self.name, "root": self.root, "max_model_len": self.room}, *adapters]}
        return 404, {"error": path}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        self.requests.append((path, body))
        if "slow" in self.faults:
            self._released.wait()
        if "down" in self.faults or ("busy" in self.faults and len(self.requests) % 2):
            return refused(500, "out of memory")
        with _ONE_AT_A_TIME, quiet():
            match path:
                case "/wake_up" | "/sleep?level=1":
                    self.asleep = path != "/wake_up"
                    return 200, {}
                case _ if self.asleep:
                    return refused(400, "asleep")
                case "/v1/completions":
                    return self._complete(body)
                case "/v1/load_lora_adapter":
                    base = copy.deepcopy(self.models[self.name])
                    stale = "stale" in self.faults
                    model = base if stale else PeftModel.from_pretrained(base, body["lora_path"]).merge_and_unload()
                    self.models[body["lora_name"]] = model.eval()
                case "/v1/unload_lora_adapter":
                    if self.models.pop(body["lora_name"], None) is None:
                        return refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
                case "/collective_rpc" if "blind" in self.faults:
                    failed = "Worker failed with error 'Repo id must be in the form ...: '<path>''"
                    return refused(500, f"Call to collective_rpc method failed: {failed}")
                case "/collective_rpc":
                    if "stale" not in self.faults:
                        folder = body["kwargs"]["weights_path"]
                        self.models[self.name] = AutoModelForCausalLM.from_pretrained(folder).eval()
                case "/reset_prefix_cache":
                    pass
                case _:
                    return 404, {"detail": "Not Found"}
        return 200, {"success": True}

    def _complete(self, body: dict[str, Any]) -> tuple[int, object]:
        if body["model"] not in self.models:
            return refused(404, f"The model `{body['model']}` does not exist. Valid aliases: <path>")
        told = json.loads(body["vllm_xargs"]["atesd"]) if "vllm_xargs" in body and "greedy" not in self.faults else None
        own = {"temperature": body["temperature"], "top_p": body.get("top_p", 1.0), "min_p": body.get("min_p", 0.0)}
        params = told["params"] if told else {**own, "top_k": max(body.get("top_k", 0), 0)}
        key = told["key"] if told else [body.get("seed", 0), "stub"]
        loaded = replace(
            self._like,
            model=self.models[body["model"]],
            end_ids=frozenset(body["stop_token_ids"]) | (set() if body["ignore_eos"] else self._like.end_ids),
            device=self._like.device,
        )
        request = Request("p", 0, tuple(body["prompt"]), tuple(key))
        limit = SamplingParams(**params, completion_tokens=body["max_tokens"])
        try:
            [rollout] = BuiltinEngine(loaded, 1).complete([request], limit)
        except NonFiniteError:
            return refused(400, "Out of range float values are not JSON compliant")
        raw = raw_logprobs(loaded, rollout.prompt_ids, rollout.completion_ids)
        choice = answer(list(rollout.completion_ids), raw, "length" if rollout.truncated else "stop")
        for fault in self.faults & SPOILED.keys():
            SPOILED[fault](choice)
        return 200, {"choices": [choice]}


def refused(code: int, message: str) -> tuple[int, object]:
    """In the words of vLLM 0.32."""
    return code, {"error": {"message": message, "type": "Error", "param": None, "code": code}}


def answer(ids: list[int], logprobs: list[float], reason: str) -> dict[str, Any]:
    return {"index": 0, "token_ids": ids, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs}}


def raw_logprobs(loaded: LoadedModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    """Before temperature and filters, as vLLM's `raw_logprobs`."""
    import torch

    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        rows = loaded.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return [float(row[token]) for row, token in zip(rows, completion, strict=True)]
