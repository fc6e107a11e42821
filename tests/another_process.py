"""Another interpreter, started once for all tests: what may not depend on the process is computed there again."""

from __future__ import annotations

import json
import subprocess
import sys
from types import TracebackType

SERVER = """
import contextlib, io, json, sys, traceback

for line in sys.stdin:
    asked = json.loads(line)
    sys.argv = ["-c", *asked["arguments"]]
    printed = io.StringIO()
    answer = {}
    try:
        with contextlib.redirect_stdout(printed):
            exec(asked["code"], {"__name__": "__main__"})
    except BaseException:
        answer["error"] = traceback.format_exc()
    print(json.dumps({**answer, "printed": printed.getvalue()}), flush=True)
"""


class AnotherProcess:
    """Runs code in another process; its hashes of strings are seeded otherwise than here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-R", "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> AnotherProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def __call__(self, code: str, *arguments: str) -> str:
        """What the code prints; `arguments` are its `sys.argv[1:]`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"code": code, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        printed: str = answer["printed"]
        return printed
