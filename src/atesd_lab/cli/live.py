"""The page of a running job on loopback: made anew when its files have grown, and nothing is ever written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import final

from atesd.cli.options import say
from atesd.errors import AtesdError, ConfigError
from atesd_lab.report.page import render_page
from atesd_lab.report.rows import read_runs

ADDRESS = "127.0.0.1"
REFRESH_SECONDS = 15


@final
class LivePage:
    """The report on some run folders, rendered again only where a file has changed."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = tuple(runs)
        self._lock = Lock()
        self._seen: object = None
        self._page = b""

    def render(self) -> bytes:
        """The page as it is now. Raises `RunError` for a damaged or missing run."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._page = render_page(read_runs(self._runs)).encode()
                self._seen = state
            return self._page

    def _state(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file that the page is made from."""
        files = sorted(path for run in self._runs for path in run.iterdir() if path.is_file())
        return [(str(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()]]


def live_server(runs: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of one page at /, on loopback only; port 0 takes a free one. `ConfigError` if the port is taken.

    It answers GET and HEAD, and only under the names of loopback, so that no other site can read it through a browser.
    """
    page = LivePage(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            """The terminal belongs to the user."""

        def _answer(self, *, body: bool) -> None:
            status, kind, content = self._content()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if status != HTTPStatus.NOT_FOUND:
                self.send_header("Refresh", str(REFRESH_SECONDS))
            self.end_headers()
            if body:
                with suppress(ConnectionError):  # the reader left
                    self.wfile.write(content)

        def _content(self) -> tuple[HTTPStatus, str, bytes]:
            port = self.connection.getsockname()[1]
            if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
                return HTTPStatus.FORBIDDEN, "text/plain", b"this page is for this machine only\n"
            if self.path != "/":
                return HTTPStatus.NOT_FOUND, "text/plain", b"there is one page, at /\n"
            try:
                return HTTPStatus.OK, "text/html", page.render()
            except (AtesdError, OSError) as error:
                return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"no page now: {error}\n".encode()

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; give a free port, or 0 for any") from error


def serve(runs: Sequence[Path], port: int) -> None:
    """Serve the page until Ctrl-C."""
    with live_server(runs, port) as server:
        say(f"live: http://{ADDRESS}:{server.server_address[1]}/  (Ctrl-C ends it; the runs go on)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
