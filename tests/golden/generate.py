"""Makes what README.md describes: `python tests/golden/generate.py archives`, then `... answers`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

GOLDEN = Path(__file__).resolve().parent
TESTS = GOLDEN.parent
# The tests know how an answer is asked for.
sys.path[:0] = [str(TESTS), *(str(TESTS / room) for room in ("cli", "config", "study"))]
PREFIX = Path("/tmp/heterokd-golden")
"""Where the roots lie while they are made; whoever unpacks an archive replaces it (`tests/archives.py`)."""

LEFT_OUT = ("caches", "tune")
"""Folders that a later search makes again."""


def heterokd(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a command in the prefix's folder."""
    return subprocess.Popen([sys.executable, "-m", "heterokd", *arguments, "--root", "runs"], cwd=PREFIX)


def interrupt(search: subprocess.Popen[bytes], trials: Path, first: int, epochs: int) -> None:
    """Interrupt a search once a trial, the `first` or a later one, has reported some epochs."""
    while not any(len(file.read_text().splitlines()) >= epochs for file in after(trials, first)):
        if search.poll() is not None:
            raise SystemExit(f"{trials}: the search ended before one of the trials was long enough to be interrupted")
        time.sleep(0.02)
    search.send_signal(signal.SIGINT)
    search.wait()


def after(trials: Path, first: int) -> list[Path]:
    """What the trials from number `first` on have reported."""
    return [file for file in trials.glob("*/metrics.jsonl") if int(file.parent.name) >= first]


def pack(name: str) -> None:
    """Pack the root as NAME.tar.xz, without caches, and remove it."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return None if set(Path(member.name).parts) & set(LEFT_OUT) else member

    with tarfile.open(GOLDEN / f"{name}.tar.xz", "w:xz") as archive:
        archive.add(PREFIX / "runs", "runs", filter=kept)
    shutil.rmtree(PREFIX / "runs")


def archives() -> None:
    """Make both archives."""
    PREFIX.mkdir()  # must not exist
    heterokd("search", str(GOLDEN / "finished.yaml")).wait()
    for trial in ("0", "2"):  # the second is the winner; it makes the first one `previous`
        heterokd("promote", "finished", "--trial", trial).wait()
    pack("finished")
    search = heterokd("search", str(GOLDEN / "interrupted.yaml"))
    interrupt(search, PREFIX / "runs/studies/interrupted/trials", first=3, epochs=4)
    pack("interrupted")
    PREFIX.rmdir()


def answers(folder: Path) -> None:
    """Ask this version everything that the golden tests ask."""
    import golden_files
    import test_decision_log
    import test_golden_hashes
    import test_json_outputs

    hashes = test_golden_hashes.STORED
    for family, ask in test_golden_hashes.FAMILIES.items():
        for case in hashes[family]:
            case["hash"] = ask(case, folder)
    test_golden_hashes.FILE.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")

    logs = {name: test_decision_log.decisions(name, folder) for name in test_decision_log.QUESTIONS}
    golden_files.write("decisions.json", logs)

    root = golden_files.unpack("finished", folder)
    outputs = test_json_outputs.STORED
    for name, stored in outputs.items():
        if name == "plan":
            file = folder / "plan.yaml"
            file.write_text(yaml.safe_dump(stored["experiment"]), encoding="utf-8")
            stored["output"] = test_json_outputs.masked(printed("plan", file, "--json", "--root", folder), folder)
        else:
            stored["output"] = test_json_outputs.output(printed, stored["arguments"], root, folder / "out")
    golden_files.write("json_outputs.json", outputs)


def printed(*arguments: object) -> Any:
    """The JSON that a command prints."""
    words = [sys.executable, "-m", "heterokd", *map(str, arguments)]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    if sys.argv[1:] == ["archives"]:
        archives()
    elif sys.argv[1:] == ["answers"]:
        with tempfile.TemporaryDirectory() as place:
            answers(Path(place))
    else:
        raise SystemExit(__doc__)
