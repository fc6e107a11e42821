"""Serve a study's page on this machine while the study runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from heterokd.config.experiment import Experiment
from heterokd.errors import HeterokdError
from heterokd.report.page import render_report
from heterokd.report.study_data import read_study
from heterokd.storage.study_dir import StudyFolder

RELOAD_SECONDS = 10
"""Seconds between two versions of the page; each takes about a second of processor time, more for many trials."""

WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="3">
<title>heterokd</title><p>{}</p><p>This page reloads itself.</p></html>"""


class LivePage:
    """The page of a study, drawn again when it is asked for and the last version is older than `RELOAD_SECONDS`.

    Args:
        folder: the study's folder.
        experiment: its experiment.
        root: the workspace as the reader names it.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self, folder: StudyFolder, experiment: Experiment, root: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.experiment, self.root, self.clock = folder, experiment, root, clock
        self._lock = threading.Lock()
        self._page, self._drawn = "", float("-inf")

    def content(self) -> str:
        """Return the page as HTML; before the first trial has finished, or if it cannot be drawn, the reason."""
        with self._lock:  # two browsers must not draw it twice
            if self.clock() - self._drawn >= RELOAD_SECONDS:
                self._page, self._drawn = self._draw(), self.clock()
            return self._page

    def _draw(self) -> str:
        try:
            report = read_study(self.folder, self.experiment)
            seconds = 0 if report.summary.progress.finished else RELOAD_SECONDS
            return render_report(report, root=self.root, reload_seconds=seconds)
        except (HeterokdError, OSError) as error:
            self._drawn = float("-inf")
            return WAITING.format(str(error).replace("&", "&amp;").replace("<", "&lt;"))


def live_server(page: LivePage, port: int) -> ThreadingHTTPServer:
    """Create a server of a page on 127.0.0.1; the caller runs `serve_forever` and closes it.

    Raises:
        OSError: the port is in use.
    """

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_page = self.path == "/"
            body = page.content().encode() if is_page else b"not found"
            self.send_response(200 if is_page else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Answer)
