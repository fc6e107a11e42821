"""Commands that search: `search` for an experiment, `auto` for a folder of images."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heterokd.cli.collection import rare_collections
from heterokd.cli.options import AsJson, ExperimentFile, Overrides, RootFolder, load_asked, print_json, program_began
from heterokd.config.quantities import PERIODS, parse_quantity
from heterokd.errors import ConfigError, StudyError, without_password

if TYPE_CHECKING:
    from heterokd.cli.terminal.console import Terminal
    from heterokd.execution.auto import AutoRequest, Proposal
    from heterokd.storage.workspace import Workspace
    from heterokd.study.summary import StudySummary


# One parameter for each option of the command line.
def search(  # its parameters are the command's options
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006  typer reads the default, nobody changes it
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; default: a local Ray.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the study of this name; its search space may have changed.")
    ] = False,
    trials: Annotated[int | None, typer.Option(help="Number of trials, instead of search.trials.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Search for the best student of an experiment.

    Trains students in parallel, confirms the leaders on fresh seeds and registers the winner. --resume continues a
    study with more trials, methods, students or other domains; finished trials count on.
    """
    changes = [*overrides, *([f"search.trials={trials}"] if trials is not None else [])]
    # Faults that files and folders show are reported before the libraries of a search are imported.
    from heterokd.config.experiment import methods_line
    from heterokd.config.reading import read_experiment
    from heterokd.storage.workspace import open_workspace

    workspace, name = open_workspace(root), read_experiment(experiment, changes).name
    if not resume:
        workspace.check_new(name)
    with rare_collections():
        asked = load_asked(experiment, changes)
        from heterokd.cli.terminal.live_search import SearchTerminal
        from heterokd.cli.terminal.search_summary import print_summary
        from heterokd.execution.check import describe_data
        from heterokd.execution.driver import search as run

    with SearchTerminal(asked, quiet=as_json) as terminal:
        for line in describe_data(asked):
            terminal.print_line(line)
        terminal.print_line(f"{asked.name}: {asked.search.extent} over {methods_line(asked)}")
        found = None
        with suppress(KeyboardInterrupt):  # before the first trial; afterwards Tune handles it
            found = run(
                asked,
                workspace,
                resume=resume,
                address=address,
                listener=terminal,
                teacher_progress=terminal.teacher_epoch,
            )
        if found is None or not found.finished:
            terminal.live.stop()
            again = _resume_command(experiment, overrides, trials, address, root)
            print(f"\ninterrupted{_kept(workspace, root.rstrip('/'), asked.name)}", file=sys.stderr)
            print(f"continue with: {again}", file=sys.stderr)
            raise typer.Exit(130)
        summary = found.summary
        if as_json:
            model = None if found.model is None else {"name": found.model[0], "version": found.model[1]}
            print_json(
                {
                    **summary.to_json(),
                    "registered": model,
                    "report": str(found.folder.report),
                    "tracking": without_password(found.uri),
                }
            )
            if found.failed:
                raise typer.Exit(1)
            return
        terminal.live.stop()
        print_summary(terminal, found, asked.search.cost_objectives, _registered(found.model, summary, asked.name))
        if found.failed:
            raise typer.Exit(1)


def _kept(workspace: Workspace, root: str, study: str) -> str:
    """Say what an interrupted search has left, and where."""
    if workspace.study(study).experiment_file.exists():
        return f": all results are kept in {root}/studies/{study}"
    from heterokd.storage.study_dir import CHECKPOINT

    fits = [file for name in ("teacher.json", CHECKPOINT) for file in workspace.teachers.glob(f"*/{name}")]
    fitted = f"; fitted teachers, and the last checkpoint of a fit, are kept in {root}/teachers" if fits else ""
    return f" before the first trial, so the study has no results yet{fitted}"


def _resume_command(file: Path, overrides: list[str], trials: int | None, address: str | None, root: str) -> str:
    """Format the command that resumes an interrupted search."""
    words = ["heterokd", "search", str(file)]
    for text in overrides:
        words += ["--set", text]
    if trials is not None:
        words += ["--trials", str(trials)]
    if address is not None:
        words += ["--address", address]
    if root != os.environ.get("HETEROKD_ROOT", "runs"):
        words += ["--root", root]
    return shlex.join([*words, "--resume"])


def _registered(model: tuple[str, str] | None, summary: StudySummary, study: str) -> str:
    if model is None:
        why = "no trial was complete" if summary.winner is None else "see the warning above"
        if summary.distillation_failure is not None:
            why = "there is none that was distilled"
        return f"no student: {why}"
    name, version = model
    return f"{name} version {version}, alias challenger   (next: heterokd promote {study})"


def _hours(budget: str) -> float:
    hours = parse_quantity("--budget", budget, PERIODS, "2h") / 3600
    if not hours:
        raise ConfigError(f"--budget {budget}: expected a period longer than zero, such as 2h")
    return hours


def _absolute(checkpoint: str | None) -> str | None:
    """Return the absolute path of an existing file or folder; the experiment may be run from another folder."""
    return str(Path(checkpoint).resolve()) if checkpoint is not None and Path(checkpoint).exists() else checkpoint


def init(
    images: Annotated[
        Path,
        typer.Argument(metavar="IMAGES_DIR", help="Folder with a subfolder per class, or with images and label maps."),
    ],
    teachers: Annotated[list[str], typer.Option("--teacher", help="Name of a network; the first is written.")],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights of the teacher: a file, or models:/NAME@ALIAS.")
    ] = None,
    out: Annotated[Path, typer.Option(dir_okay=False, help="File to write.")] = Path("experiment.yaml"),
    root: RootFolder = "runs",
) -> None:
    """Write a commented experiment for a folder of images.

    Nothing is trained: edit the file, then run `heterokd plan` and `heterokd search`.
    """
    from heterokd.cli.terminal.console import Terminal
    from heterokd.execution.auto import AutoRequest
    from heterokd.storage.workspace import open_workspace

    if out.exists():
        raise ConfigError(f"--out {out}: exists already; move it away, or give another name")
    request = AutoRequest(images, teachers, file=out, checkpoint=_absolute(checkpoint))
    made = _proposed(request, open_workspace(root), Terminal(), fit=False)
    print(f"edit {made.file}, then: heterokd search {made.file}{'' if root == 'runs' else f' --root {root}'}")


def _proposed(request: AutoRequest, state: Workspace, terminal: Terminal, *, fit: bool) -> Proposal:
    """Inspect the folder of a request, write its experiment and print what was found and chosen."""
    from heterokd.datasets.io.inspect import FolderInspection, inspect_folder, usable_folder
    from heterokd.datasets.masks.inspect import MaskInspection, inspect_masks
    from heterokd.datasets.masks.pairs import has_label_maps
    from heterokd.execution.auto import propose

    images = request.images
    seen: FolderInspection | MaskInspection
    if images.is_dir() and has_label_maps(images):
        seen, folder = inspect_masks(images), images.resolve()
    else:
        seen = inspect_folder(images)
        folder = usable_folder(seen, state.path / "auto" / images.resolve().name)
    for sentence in seen.sentences():
        terminal.print_line(sentence)
    made = propose(seen, replace(request, images=folder), state, fit=fit, progress=terminal.teacher_epoch)
    for sentence in made.reasons:
        terminal.print_line(sentence)
    terminal.print_line(f"experiment {made.file}")
    return made


# One parameter for each option of the command line.
def auto(  # its parameters are the command's options
    images: Annotated[
        Path,
        typer.Argument(metavar="IMAGES_DIR", help="Folder with a subfolder per class, or with images and label maps."),
    ],
    teachers: Annotated[
        list[str],
        typer.Option("--teacher", help="Name of a network; may be given several times: the best on val is used."),
    ],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights of the teacher: a file, or models:/NAME@ALIAS.")
    ] = None,
    students: Annotated[
        list[str], typer.Option("--student", help="Name of a network; may be given several times; default: proposed.")
    ] = [],  # noqa: B006
    max_params_m: Annotated[float | None, typer.Option(min=0, help="Maximum millions of parameters.")] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0, help="Maximum latency, batch 1 on a single core.")
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="PERIOD", help="Time limit of the search: 30m, 2h, 1d.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the experiment and its plan only.")] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="File to write the experiment to.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Search for a student for a folder of images.

    Inspects the images, writes an experiment, shows its plan and runs it.
    """
    began = program_began()
    from heterokd.cli.terminal.console import Terminal
    from heterokd.cli.terminal.tables import plan_lines
    from heterokd.execution.auto import AutoRequest
    from heterokd.execution.auto_budget import within_budget
    from heterokd.execution.planning.plan import measure_experiment, plan_at
    from heterokd.storage.workspace import open_workspace

    hours = None if budget is None else _hours(budget)
    options = {"params_m": max_params_m, "latency_ms": max_latency_ms}
    for key, limit in options.items():
        if limit is not None and not 0 < limit < math.inf:
            raise ConfigError(f"--max-{key.replace('_', '-')} {limit:g}: expected a number above 0; correct it")
    limits = {key: limit for key, limit in options.items() if limit is not None}
    terminal = Terminal(quiet=as_json)
    state = open_workspace(root)
    request = AutoRequest(images, teachers, students, limits, hours, out, _absolute(checkpoint))
    made = _proposed(request, state, terminal, fit=not dry_run)
    study = state.study(made.experiment.name)
    if study.experiment_file.exists() and not dry_run:
        raise StudyError(
            f"{study.path}: the study {made.experiment.name!r} exists already; continue it "
            f"(heterokd search {made.file} --resume), or rename the folder of images"
        )
    costs = measure_experiment(made.experiment, state, began=began, say=terminal.print_line)
    if hours is not None:
        fitted, costs = within_budget(made, state, costs, 3600 * hours - (time.time() - began))
        for sentence in fitted.reasons[len(made.reasons) :]:
            terminal.print_line(sentence)
        made = fitted
    plan = plan_at(made.experiment, state, costs)
    for line in plan_lines(plan):
        terminal.print_line(line)
    if not dry_run:
        search(made.file, [], None, False, None, root, as_json)
    elif as_json:
        print_json({"experiment": str(made.file), "said": list(made.sentences), "plan": plan.to_json()})
    else:
        print(f"run it with: heterokd search {made.file}{'' if root == 'runs' else f' --root {root}'}")
