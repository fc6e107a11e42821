"""Commands before a search: estimate its cost, compare stages, check the cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from heterokd.cli.options import AsJson, ExperimentFile, Overrides, RootFolder, load_asked, print_json, program_began
from heterokd.formatting import epoch_score


def plan(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to measure on; default: a local Ray.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Estimate time, money, memory and disk space of a search.

    Times a few steps of each method where trials would run.
    """
    began = program_began()
    asked = load_asked(experiment, overrides)
    from heterokd.cli.terminal.console import Terminal
    from heterokd.cli.terminal.tables import plan_lines
    from heterokd.execution.check import describe_data
    from heterokd.execution.planning.plan import plan_experiment
    from heterokd.execution.ray_connection import check_address
    from heterokd.storage.workspace import open_workspace

    check_address(address)
    terminal = Terminal(quiet=as_json)
    for line in describe_data(asked):
        terminal.print_line(line)
    terminal.print_line(f"{asked.name}: timing a few steps of each method")
    found = plan_experiment(asked, open_workspace(root), address=address, began=began, say=terminal.print_line)
    if as_json:
        print_json(found.to_json())
        return
    terminal.print_line("")
    for line in plan_lines(found):
        terminal.print_line(line)


def match(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Compare the stages of teacher and student by CKA.

    Proposes initial settings for methods that pair stages.
    """
    asked = load_asked(experiment, overrides)
    from heterokd.cli.terminal.console import Terminal
    from heterokd.cli.terminal.tables import match_table
    from heterokd.execution.match import match as run
    from heterokd.storage.workspace import open_workspace

    terminal = Terminal(quiet=as_json, fit_epochs=asked.teacher.training.epochs)

    def epoch(metrics: dict[str, float]) -> bool:
        terminal.print_line(f"student without a teacher: epoch {int(metrics['epoch']):>3}  {epoch_score(metrics)}")
        return True

    found = run(asked, open_workspace(root), on_epoch=epoch, teacher_progress=terminal.teacher_epoch)
    if as_json:
        content = {"similarity": found.similarity, "starts": found.starts, "picture": str(found.picture)}
        print_json({**content, "student_score": found.student_score, "space": found.to_yaml()})
        return
    terminal.print_table(match_table(found.similarity))
    terminal.print_line(f"picture  {found.picture}")
    terminal.print_line("initial settings (tried with search.match_starts: true; or as overrides of a search space:)")
    terminal.print_line(found.to_yaml().rstrip())


def doctor(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to check; default: a local Ray.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Check a cluster before a search.

    Checks storage, MLflow server, data and GPUs on every node.
    """
    asked = load_asked(experiment, overrides)
    from heterokd.execution.doctor import as_json as plain
    from heterokd.execution.doctor import examine, table
    from heterokd.execution.ray_connection import check_address
    from heterokd.storage.workspace import open_workspace

    check_address(address)
    checks = examine(asked, open_workspace(root, checked=False), address)
    if as_json:
        print_json(plain(checks))
    else:
        print("\n".join(table(checks)))
    if not all(check.passed for check in checks):
        raise typer.Exit(2)
