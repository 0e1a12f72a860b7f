"""The live page: on loopback, read-only, and as new as the run folder."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from atesd.errors import ConfigError
from atesd_lab.cli.live import ADDRESS, live_server
from atesd_lab.report.page import render_page
from atesd_lab.report.rows import read_runs
from fake_run import metric_row, write_fake_run


@contextmanager
def serving(*runs: Path) -> Iterator[str]:
    """The address of a server of the runs' page."""
    with live_server(runs, 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield address(server)
        finally:
            server.shutdown()
            thread.join()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://{ADDRESS}:{server.server_address[1]}/"


def fetched(url: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert answer.headers["Refresh"]
            assert answer.headers["Cache-Control"] == "no-store"
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_serves_the_report_as_it_is_now_and_writes_nothing(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    before = contents(tmp_path)
    with serving(run.path) as url:
        assert fetched(url) == (200, render_page(read_runs([run.path])))
        assert fetched(url, "HEAD") == (200, "")
        assert contents(tmp_path) == before
        run.append("metrics", metric_row(60, 0.5, np.random.default_rng(0)))
        assert fetched(url) == (200, render_page(read_runs([run.path])))
        assert "61 of 60 updates" in fetched(url)[1]


def test_it_listens_on_loopback_and_answers_no_other_name(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", updates=20)
    with live_server([run.path], 0) as server:
        assert server.server_address[0] == "127.0.0.1"
    with serving(run.path) as url:
        assert fetched(url, Host="attacker.example")[0] == 403
        assert fetched(url + "manifest.json")[0] == 404
        assert fetched(url, "POST")[0] == 501


def test_a_damaged_run_is_said_and_comes_back_when_it_is_mended(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", updates=20)
    metrics = run.path / "metrics.jsonl"
    rows = metrics.read_bytes()
    with serving(run.path) as url:
        metrics.write_bytes(b"not json\n" + rows)
        status, text = fetched(url)
        assert status == 503
        assert "metrics.jsonl" in text
        metrics.write_bytes(rows)
        assert fetched(url)[0] == 200


def test_a_port_that_is_taken_is_named() -> None:
    with live_server([Path()], 0) as server, pytest.raises(ConfigError, match="give a free port"):
        live_server([Path()], server.server_address[1])
