"""What a search asks of a cluster's parts, on paper: the table of docs/cluster_numbers.md for 1, 16 and 128 nodes.

    python -m benchmarks.cluster_numbers [--nodes 1 16 128] [--seconds 300] [--reports 4] [--megabytes 60]

Each constant below is a figure that another benchmark measured, or a price list's; the table multiplies them. The loop
and the store are simulated for as many trials at a time by `python -m benchmarks.growth --running 128`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

STUDY_MS_A_TRIAL = 34.0
"""Processor time of the study's actor at 1,100 trials: suggestion, reports, end (benchmarks/many_trials.py)."""

DRIVER_SECONDS_A_TRIAL = 0.32
"""The driver's processor time, with MLflow (benchmarks/overhead.py)."""

LOOP_MS_AN_EVENT = 20.0
"""At most; the goal of benchmarks/growth.py up to 2,000 trials."""

MLFLOW_REQUESTS_A_TRIAL = 3128 / 300
"""Of the server (benchmarks/mlflow_faults.py)."""

REQUESTS_A_PUSH = 3
"""By a trial's process: at its start, at each report and at its end (benchmarks/growth.py, requests of a trial)."""

UPLOAD_SECONDS = 5.0
"""Between two uploads of a running trial's metrics, at least (docs/cluster.md)."""

REQUESTS_A_READ = 2
"""By the driver, for each file that an event changed: its size and its content."""

FILES_AN_EVENT = 2
"""trial.json and metrics.jsonl."""

PUT_PRICE, GET_PRICE = 0.005 / 1000, 0.0004 / 1000
HEAD_PRICE, SPOT_PRICE = 0.22, 0.45
"""USD in us-east-1, early 2025: a request to S3; an hour of m7i.xlarge with disk and address, of g6.2xlarge as spot."""


@dataclass(frozen=True)
class Load:
    """A search whose trials have one GPU node each.

    Attributes:
        nodes: nodes with a GPU, as many as trials at a time.
        seconds: of a trial.
        reports: of a trial to the study, at its rungs.
        megabytes: of a checkpoint, with the optimizer's state.
    """

    nodes: int
    seconds: float = 300.0
    reports: int = 4
    megabytes: float = 60.0

    @property
    def trials(self) -> float:
        """Trials that end in a second."""
        return self.nodes / self.seconds

    @property
    def events(self) -> float:
        """Starts, reports and ends in a second."""
        return self.trials * (self.reports + 2)

    @property
    def puts(self) -> float:
        """Requests that write to the store, in a second."""
        return self.trials * ((self.reports + 2) * REQUESTS_A_PUSH + self.seconds / UPLOAD_SECONDS)

    @property
    def gets(self) -> float:
        """Requests that read from the store, in a second."""
        return self.events * FILES_AN_EVENT * REQUESTS_A_READ

    @property
    def bytes_up(self) -> float:
        """Megabytes of checkpoints that the nodes send to the store in a second."""
        return self.trials * self.reports * self.megabytes


def short(value: float) -> str:
    """Return a number with two significant digits."""
    return f"{float(f'{value:.2g}'):g}"


ROWS: dict[str, Callable[[Load], str]] = {
    "trials an hour": lambda load: f"{3600 * load.trials:,.0f}",
    "events of the driver's loop in a second": lambda load: short(load.events),
    "loop, share of its time": lambda load: short(load.events * LOOP_MS_AN_EVENT / 10) + " %",
    "study actor, share of a core": lambda load: short(load.trials * STUDY_MS_A_TRIAL / 10) + " %",
    "driver with MLflow's client, share of a core": lambda load: (
        short(load.trials * DRIVER_SECONDS_A_TRIAL * 100) + " %"
    ),
    "requests to the store in a second: writing": lambda load: short(load.puts),
    "requests to the store in a second: reading": lambda load: short(load.gets),
    "requests to MLflow in a second": lambda load: short(load.trials * MLFLOW_REQUESTS_A_TRIAL),
    "checkpoints to the store, MB in a second": lambda load: short(load.bytes_up),
    "USD an hour: head and spot nodes": lambda load: f"{HEAD_PRICE + load.nodes * SPOT_PRICE:.2f}",
    "USD an hour: requests to the store": lambda load: short(3600 * (load.puts * PUT_PRICE + load.gets * GET_PRICE)),
}


def table(loads: list[Load]) -> str:
    """Return the table as Markdown."""
    lines = ["| nodes | " + " | ".join(f"{load.nodes}" for load in loads) + " |", "|---|" + "---:|" * len(loads)]
    lines += [f"| {name} | " + " | ".join(value(load) for load in loads) + " |" for name, value in ROWS.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16, 128], help="nodes with a GPU")
    parser.add_argument("--seconds", type=float, default=300.0, help="of a trial")
    parser.add_argument("--reports", type=int, default=4, help="of a trial, at its rungs")
    parser.add_argument("--megabytes", type=float, default=60.0, help="of a checkpoint")
    given = parser.parse_args()
    print(table([Load(nodes, given.seconds, given.reports, given.megabytes) for nodes in given.nodes]))


if __name__ == "__main__":
    main()
