"""Commands that train a student, reproduce published results, or prepare a teacher and its cache."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from heterokd.cli.options import (
    AsJson,
    ExperimentFile,
    Overrides,
    RootFolder,
    check_root,
    load_asked,
    method_names,
    print_json,
)
from heterokd.formatting import epoch_score


def distill(
    experiment: ExperimentFile,
    method: Annotated[
        str, typer.Option(help="Name (see heterokd methods), or FILE.py:Class.", autocompletion=method_names)
    ],
    overrides: Overrides = [],  # noqa: B006
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Train a student once with the published settings of a method.

    Logs the training like a trial.
    """
    from heterokd.config.extension import is_reference
    from heterokd.errors import ConfigError, did_you_mean
    from heterokd.methods import METHODS

    if method not in METHODS and not is_reference(method):
        raise ConfigError(f"--method {method}: there is no such method; {did_you_mean(method, METHODS)}")
    asked = load_asked(experiment, [*overrides, f"search.space={{methods: [{json.dumps(method)}]}}"])
    (name,) = asked.methods
    from heterokd.cli.terminal.console import Terminal
    from heterokd.execution.check import describe_data
    from heterokd.execution.distill import distill_once
    from heterokd.storage.workspace import open_workspace

    terminal = Terminal(quiet=as_json, fit_epochs=asked.teacher.training.epochs)
    for line in describe_data(asked):
        terminal.print_line(line)

    def epoch(metrics: dict[str, float]) -> bool:
        terminal.print_line(
            f"epoch {int(metrics['epoch']):>3}  loss {metrics['train/loss']:.4f}  "
            f"{epoch_score(metrics)}  {metrics['time/images_per_second']:.0f} images/s"
        )
        return True

    result = distill_once(asked, name, open_workspace(root), epoch, terminal.teacher_epoch)
    trial, metrics = result.trial, result.metrics
    if as_json:
        print_json(
            {"trial": str(trial.path), "metrics": metrics, "trained": result.trained, "weights": str(trial.weights)}
        )
        return
    if not result.trained:
        terminal.print_line("this recipe was already trained; nothing to do")
    terminal.print_line(f"{name}: {epoch_score(metrics)} on val; weights in {trial.weights}")


def reproduce(
    experiment: ExperimentFile,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds per method.")] = 3,
    methods: Annotated[str | None, typer.Option(help="Only these methods, separated by commas.")] = None,
    overrides: Overrides = [],  # noqa: B006
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Reproduce published results over several seeds.

    Trains the published settings and compares the results.
    """
    asked = load_asked(experiment, overrides)
    from heterokd.cli.terminal.console import Terminal
    from heterokd.cli.terminal.tables import reproduction_table
    from heterokd.execution.reproduce import reproduce as run
    from heterokd.storage.workspace import open_workspace

    chosen = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    terminal = Terminal(quiet=as_json, fit_epochs=asked.teacher.training.epochs)

    def epoch(method: str, seed: int, metrics: dict[str, float]) -> bool:
        terminal.print_line(
            f"{method:<10} seed {seed}  epoch {int(metrics['epoch']):>3}  {epoch_score(metrics)}  "
            f"{metrics['time/images_per_second']:.0f} images/s"
        )
        return True

    found = run(
        asked,
        open_workspace(root),
        methods=chosen,
        seeds=seeds,
        on_epoch=epoch,
        teacher_progress=terminal.teacher_epoch,
    )
    if as_json:
        print_json({**found.to_json(), "folder": str(found.folder.path)})
        return
    terminal.print_line("")
    terminal.print_table(reproduction_table(found))
    for sentence in found.sentences():
        terminal.print_line(sentence)
    terminal.print_line(f"table    {found.folder.path / 'reproduction.csv'}")


def teacher(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to fit on; default: this process.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Fit the teachers, or verify their checkpoints.

    Searches reuse fitted teachers.
    """
    asked = load_asked(experiment, overrides)
    from heterokd.cli.terminal.console import Terminal
    from heterokd.execution.check import check_experiment, check_files
    from heterokd.execution.prepare import prepare_teachers
    from heterokd.storage.workspace import open_workspace
    from heterokd.students.given_weights import with_given_weights
    from heterokd.study.known_scratch import weak_teachers

    state = open_workspace(root)
    asked = with_given_weights(asked, state)
    check_experiment(asked)
    check_files(asked, state)
    terminal = Terminal(quiet=as_json, fit_epochs=asked.teacher.training.epochs)
    if address is None:
        found = list(prepare_teachers(asked, state, terminal.teacher_epoch).values())
    else:
        from heterokd.execution.node_task import tasks_on
        from heterokd.execution.ray_connection import check_address

        check_address(address)
        with tasks_on(asked, state, address) as tasks:
            found = list(prepare_teachers(asked, state, terminal.teacher_epoch, tasks).values())
    weak = weak_teachers([each.card for each in found], asked, state)
    if weak is not None:
        print(weak, file=sys.stderr)
    if as_json:
        rows = [
            {**each.card.content(), "file": each.weights and str(each.weights), "fitted": each.fitted} for each in found
        ]
        print_json(rows[0] if len(rows) == 1 else {"teachers": rows})
        return
    for prepared in found:
        card, how = prepared.card, "fitted now" if prepared.fitted else "ready"
        terminal.print_line(f"{card.network}: {card.score} on val, {how} ({card.source})")
        if prepared.settings.checkpoint is None and prepared.weights is not None:
            terminal.print_line(f"fit: {card.reason or 'all weights, by a version without teacher.fit'}")
        if card.members:
            terminal.print_line(f"members on val: {', '.join(card.members)}")
        if card.calibration():
            terminal.print_line(f"calibration: {card.calibration()}")
        terminal.print_line(f"weights {prepared.weights or 'published by timm'}, SHA-256 {card.weights}")


# One parameter for each option of the command line.
def cache(  # its parameters are the command's options
    names: Annotated[
        list[str],
        typer.Argument(metavar="EXPERIMENT | [ID]...", help="Experiment whose cache to build, or ids of caches."),
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to build on; default: a local Ray.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the caches.")] = False,
    verifying: Annotated[bool, typer.Option("--verify", help="Verify checksums of these caches, or of all.")] = False,
    pruning: Annotated[bool, typer.Option("--prune", help="Delete caches; caches in use are kept.")] = False,
    unused_for: Annotated[
        str | None, typer.Option(metavar="PERIOD", help="Delete caches unused for longer, such as 30d.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Delete least recently used caches down to 10GB."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all caches.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show which caches would be deleted.")] = False,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Build, list, verify or prune teacher caches."""
    from heterokd.cli.cache import CacheRequest, run
    from heterokd.errors import CacheError
    from heterokd.storage.workspace import open_workspace

    check_root(root, written=not (listing or verifying or dry_run))
    request = CacheRequest(
        names, overrides, address, listing, verifying, pruning, unused_for, max_size, everything, dry_run
    )
    answer = run(request, open_workspace(root), quiet=as_json)
    if as_json:
        print_json(answer.content)
    for line in () if as_json else answer.lines:
        print(line)
    if answer.problems:
        sys.stdout.flush()
        raise CacheError("\n".join(answer.problems))
