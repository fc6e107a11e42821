"""What is no YAML file is refused at once, and a YAML file is read as it is written."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from heterokd.config.reading import read_experiment
from heterokd.config.yaml_files import LONGEST_FILE, dump_yaml, plain_yaml
from heterokd.errors import ConfigError


def a_socket(file: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(file.parent)  # a socket's path may be at most 107 bytes long
    listener.bind(file.name)
    listener.close()


def a_large_file(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(LONGEST_FILE + 1)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "is a device or a pipe"),
    "socket": (a_socket, "is a device or a pipe"),
    "zero": (lambda file: file.symlink_to("/dev/zero"), "is a device or a pipe"),
    "folder": (Path.mkdir, "cannot be read (Is a directory)"),
    "loop": (lambda file: file.symlink_to(file), "e.yaml: "),
    "dangling": (lambda file: file.symlink_to("nowhere"), "there is no such file"),
    "large": (a_large_file, "has more than 16 MB"),
    "binary": (lambda file: file.write_bytes(bytes(range(256))), "is not text in UTF-8"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_text_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, says = FILES[kind]
    make(tmp_path / "e.yaml")
    with pytest.raises(ConfigError) as caught:
        read_experiment(tmp_path / "e.yaml")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_written_values_are_read_as_they_were() -> None:
    texts = [
        "1e-3",
        "08",
        "010",
        "no",
        "On",
        "1:30",
        "<<",
        "=",
        "2026-01-01",
        "null",
        "~",
        ".5e3",
        "1.",
        "0x1F",
        ".nan",
    ]
    content = {"texts": texts, **{text: text for text in texts}, "numbers": [1e-5, 1e20, 0.1, 7, True, None]}
    assert plain_yaml(dump_yaml(content)) == content


@pytest.mark.parametrize("level", ["[", "{a: ", "- "])
def test_a_file_of_a_hundred_thousand_levels_is_refused(tmp_path: Path, level: str) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text(level * 100_000)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_experiment(file)
