"""Processor seconds of the commands that train nothing, mostly imports: the smallest of three runs of each.

    python benchmarks/commands.py STUDY [--root runs] [--images FOLDER] [--teacher NAME] [--before CHECKOUT]

STUDY is a finished study of the root. `init` is run on a folder of images, if given. With `--before`, each run is
followed by a run of the package in another checkout, and the ratio is printed.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="a finished study")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--images", help="folder with a subfolder per class")
    parser.add_argument("--teacher", default="efficientnet_lite0", help="of `init`")
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    arguments = parser.parse_args()
    study = [arguments.study, "--root", arguments.root]
    experiment = Path(arguments.root, "studies", arguments.study, "experiment.yaml")
    commands = {
        "plan": ["plan", str(experiment), "--root", arguments.root],
        "report": ["report", *study],
        "compare": ["compare", *study],
        "promote --dry-run": ["promote", "--dry-run", *study],
    }
    if arguments.images:
        commands["init"] = ["init", arguments.images, "--teacher", arguments.teacher, "--root", arguments.root]
    checkouts = [Path(__file__).parents[1], *([arguments.before] if arguments.before else [])]
    print("| command | now, s | before, s | ratio |" if arguments.before else "| command | now, s |")
    print("|---|---|---|---|" if arguments.before else "|---|---|")
    for name, command in commands.items():
        seconds = [[processor_seconds(command, checkout) for checkout in checkouts] for _ in range(RUNS)]
        least = [min(times) for times in zip(*seconds, strict=True)]
        ratio = [f"{least[0] / least[1]:.2f}"] if arguments.before else []
        print("| " + " | ".join([name, *(f"{value:.1f}" for value in least), *ratio]) + " |", flush=True)


def processor_seconds(command: list[str], checkout: Path) -> float:
    """Processor time of a command and of the processes that it waits for, which those of Ray are not."""
    with tempfile.TemporaryDirectory() as folder:
        out = ["--out", str(Path(folder, "experiment.yaml"))] if command[0] == "init" else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run(
            [sys.executable, "-m", "heterokd", *command, *out], check=True, capture_output=True, env=environment
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
