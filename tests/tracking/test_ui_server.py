"""The champion behind a real server answers a request with an image as the trained student does."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import fabricated
import numpy as np
import pytest
import torch
from PIL import Image

from heterokd.students.promotion.promote import promote
from heterokd.tracking.store import open_store
from heterokd.training.data import open_splits

STARTS_WITHIN = 180
"""Seconds; a busy machine imports torch and MLflow slowly."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no answer within {STARTS_WITHIN} s: {log.read_text()}")


@pytest.mark.slow
def test_the_champion_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root, question = fabricated.root_with_store(tmp_path), fabricated.experiment()
    splits = open_splits(question.data)
    student = fabricated.fitted_student(splits, 200)
    folder = fabricated.study(root, question)
    fabricated.trial(folder, question, 1, student=student)
    fabricated.summary(fabricated.ranked(1)).write(folder)
    assert promote(root, "tiny").changed

    # Images as a client has them: PNG files.
    files = []
    for pixels in splits.test.images.read(np.arange(3)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    given = images.transpose(0, 3, 1, 2).astype(np.float32) / 255

    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/digits-student@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": open_store(root, None),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        # mlflow starts uvicorn by its name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server, log)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            data=json.dumps({"inputs": given.tolist()}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            got = np.asarray(json.loads(answer.read())["predictions"], np.float32)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    with torch.inference_mode():
        wanted = student(torch.from_numpy(given)).logits.numpy()
    assert got.shape == (3, 10)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
