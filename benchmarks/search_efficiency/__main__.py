"""`python -m benchmarks.search_efficiency`: build the tables, or search them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.search_efficiency import figures, run
from benchmarks.search_efficiency.build import build_all
from benchmarks.search_efficiency.pairs import PAIRS
from benchmarks.search_efficiency.strategies import STRATEGIES
from benchmarks.search_efficiency.table import stored
from heterokd.training.precision import device_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("build", "run"), nargs="?", default="run")
    parser.add_argument("--pair", choices=PAIRS, action="append", help="all three when left out")
    parser.add_argument(
        "--limit", type=float, help="seconds after which nothing further is begun; go on by running again"
    )
    parser.add_argument("--strategy", choices=STRATEGIES, action="append", help="all when left out")
    parser.add_argument("--budget", type=int, action="append", help="full trainings")
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fresh", action="store_true", help="make again what was made before")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--picture", type=Path, help="draw regret against compute")
    arguments = parser.parse_args()
    pairs = arguments.pair or list(PAIRS)
    if arguments.command == "build":
        missing = [name for name in pairs if arguments.fresh or name not in stored()]
        sys.exit(0 if not missing or build_all(missing, arguments.processes, arguments.limit) else 3)
    for strategy in (arguments.strategy or [None]) if arguments.fresh else []:
        run.forget(strategy)
    lacking = [name for name in pairs if name not in stored()]
    if lacking:
        sys.exit(f"no table of {', '.join(lacking)}; build it first: python -m benchmarks.search_efficiency build")
    strategies, budgets = arguments.strategy or list(STRATEGIES), arguments.budget or run.BUDGETS
    wanted = list(run.tasks(pairs, strategies, budgets, arguments.repetitions))
    results = run.run(wanted, processes=arguments.processes, limit=arguments.limit)
    rows = run.summarise(results)
    figures.show(rows)
    met = figures.goals(rows)
    print()
    for goal, is_met in met.items():
        print(f"{'met' if is_met else 'NOT MET':<9}{goal}")
    if arguments.out:
        machine = f"{os.cpu_count()} cores, {device_name('cpu')}"
        content = {"machine": machine, "rows": [asdict(row) for row in rows], "goals": met}
        arguments.out.write_text(json.dumps(content, indent=1))
    if arguments.picture:
        figures.draw(rows, arguments.picture)
    if len(results) < len(wanted):
        print(f"{len(results)} of {len(wanted)} searches; run this again to go on")
        sys.exit(3)


if __name__ == "__main__":
    main()
