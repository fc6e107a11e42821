"""The commands that come before a search: what it will take, what may work, what is missing."""

from __future__ import annotations

from typing import Annotated

import typer

from heterokd.cli.options import AsJson, ExperimentFile, Overrides, RootFolder, load_asked, print_json, program_began
from heterokd.formatting import epoch_score


def plan(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to measure on; a local Ray when left out.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Say what a search will take (time, device-hours, money, memory, disk): a few steps of each method are timed."""
    began = program_began()
    asked = load_asked(experiment, overrides)
    from heterokd.cli.terminal.console import Terminal
    from heterokd.cli.terminal.tables import plan_lines
    from heterokd.execution.planning.plan import plan_experiment
    from heterokd.execution.ray_connection import check_address
    from heterokd.storage.workspace import open_workspace

    check_address(address)
    with Terminal(asked.metric, quiet=as_json) as terminal:
        terminal.say(f"{asked.name}: nothing is trained now")
        found = plan_experiment(asked, open_workspace(root), address=address, began=began, say=terminal.say)
        if as_json:
            print_json(found.to_json())
            return
        terminal.say("")
        for line in plan_lines(found):
            terminal.say(line)


def match(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Compare the stages of teacher and student (CKA), and propose where methods that pair stages might start."""
    asked = load_asked(experiment, overrides)
    from heterokd.cli.terminal.console import Terminal
    from heterokd.cli.terminal.tables import match_table
    from heterokd.execution.match import match as run
    from heterokd.storage.workspace import open_workspace

    with Terminal(asked.metric, quiet=as_json) as terminal:

        def epoch(metrics: dict[str, float]) -> bool:
            terminal.say(f"student on labels alone: epoch {int(metrics['epoch']):>3}  {epoch_score(metrics)}")
            return True

        found = run(asked, open_workspace(root), on_epoch=epoch, teacher_progress=terminal.teacher_epoch)
        if as_json:
            content = {"similarity": found.similarity, "starts": found.starts, "picture": str(found.picture)}
            print_json({**content, "student_score": found.student_score, "space": found.to_yaml()})
            return
        terminal.show(match_table(found.similarity))
        terminal.say(f"picture  {found.picture}")
        terminal.say("starts   (search.match_starts: true tries them; or narrow a search space to them:)")
        terminal.say(found.to_yaml().rstrip())


def doctor(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to look at; a local Ray when left out.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Before a search: would every node reach the storage, the MLflow server, the data and the GPUs that it needs?"""
    asked = load_asked(experiment, overrides)
    from heterokd.execution.doctor import as_json as plain
    from heterokd.execution.doctor import examine, table
    from heterokd.execution.ray_connection import check_address
    from heterokd.storage.workspace import open_workspace

    check_address(address)
    checks = examine(asked, open_workspace(root), address)
    if as_json:
        print_json(plain(checks))
    else:
        print("\n".join(table(checks)))
    if not all(check.passed for check in checks):
        raise typer.Exit(2)
