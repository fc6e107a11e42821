"""Servers of object stores on loopback, for tests, each in a process: moto for s3://, an emulator for gs://."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECRET = "a-secret-key-that-must-stay-secret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(log: Path, bucket: str = "state") -> Iterator[dict[str, str]]:
    """Environment variables by which S3's clients find a server that holds one empty bucket."""
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "AKIDHETEROKD",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with _serving(log, port, "moto.server", "-H", "127.0.0.1", "-p", str(port)):
        code = f"import boto3; boto3.client('s3').create_bucket(Bucket={bucket!r})"
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)
        yield environment


@contextmanager
def gs_server(log: Path, bucket: str = "state") -> Iterator[dict[str, str]]:
    """Environment variables by which clients of Google's storage find an emulator that holds one empty bucket."""
    port = free_port()
    begin = ("start", "--host=127.0.0.1", f"--port={port}", "--in-memory", f"--default-bucket={bucket}")
    with _serving(log, port, "gcp_storage_emulator", *begin):
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}


@contextmanager
def _serving(log: Path, port: int, module: str, *arguments: str) -> Iterator[None]:
    """Run a module that serves at a port."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", module, *arguments]
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{module} does not start"
            time.sleep(0.1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
