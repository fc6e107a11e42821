"""Every benchmark, one after the other; each prints a table and writes JSON beside itself (not kept in git)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# This file, what others run, and what needs images and weights that are not in the repository.
NO_BENCHMARKS = (
    *("run.py", "reference.py", "nothing.py", "hurting.py", "bad_input_cases.py", "teacher.py", "counted_store.py"),
    "commands.py",  # needs a finished study
    *("evaluated.py", "busy_threads.py"),  # print ratios, see benchmarks/RESULTS.md
    "growth.py",  # a module, see below
)


def main() -> None:
    for file in sorted(HERE.glob("*.py")):
        if file.name not in NO_BENCHMARKS:
            print(f"== {file.stem}", flush=True)
            subprocess.run([sys.executable, str(file), "--out", str(HERE / f"{file.stem}.json")], check=True)
    print("== growth", flush=True)
    command = [sys.executable, "-m", "benchmarks.growth", "--out", str(HERE / "growth.json")]
    subprocess.run(command, check=True, cwd=HERE.parent)
    print("== search_efficiency", flush=True)
    command = [sys.executable, "-m", "benchmarks.search_efficiency"]
    subprocess.run([*command, "build"], check=True, cwd=HERE.parent)
    subprocess.run([*command, "run", "--out", str(HERE / "search_efficiency.json")], check=True, cwd=HERE.parent)


if __name__ == "__main__":
    main()
