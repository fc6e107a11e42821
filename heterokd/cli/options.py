"""Options shared by several commands, and their checks."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from heterokd.config.experiment import Experiment
    from heterokd.storage.study_dir import StudyFolder

READING = ("cache", "compare", "doctor", "plan")
"""Commands that do not write to the root; `cache` checks the root itself if it writes."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk."""

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="YAML file of the experiment.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, for example search.trials=50; may be given several times."
    ),
]


def _usable(context: typer.Context, root: str) -> str:
    """Check that the command can use the root, before it starts."""
    check_root(root, written=context.info_name not in READING)
    return root


def check_root(root: str, *, written: bool) -> None:
    """Check that the root is a folder; if `written`, also that it is writable."""
    if "://" in root:  # an object store is checked on opening
        return
    place = Path(root)
    try:
        while not place.exists():
            if place.is_symlink():
                raise typer.BadParameter(
                    f"{str(place)!r} is a symbolic link to nothing; correct it, or give another folder (--root or "
                    "HETEROKD_ROOT)"
                )
            place = place.parent
        if not place.is_dir():
            raise typer.BadParameter(f"{str(place)!r} is a file; give a folder (--root or HETEROKD_ROOT)")
        if written:
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        if error.errno in FULL:
            raise
        raise typer.BadParameter(
            f"{str(place)!r} cannot be used ({error.strerror}); change its permissions, or give another --root"
        ) from None


RootFolder = Annotated[
    str,
    typer.Option(
        "--root",
        envvar="HETEROKD_ROOT",
        metavar="FOLDER",
        callback=_usable,
        help="Workspace: a folder, or s3://, gs://, file://.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object as the last line of stdout.")]


def study_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a study of the workspace, if that is a folder of this machine."""
    root = context.params.get("root") or os.environ.get("HETEROKD_ROOT", "runs")
    folders = Path(root, "studies").glob("*/experiment.yaml")
    return sorted(file.parent.name for file in folders if file.parent.name.startswith(incomplete))


def method_names(incomplete: str) -> list[str]:
    """Complete the name of a method."""
    from heterokd.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


StudyName = Annotated[
    str,
    typer.Argument(metavar="STUDY", help="Name of the study (the experiment's name).", autocompletion=study_names),
]


def program_began() -> float:
    """Start time of this process, in seconds since the epoch."""
    import psutil

    return float(psutil.Process().create_time())


def load_asked(file: Path, overrides: list[str]) -> Experiment:
    """Load an experiment; imports the configuration on first use."""
    from heterokd.config.reading import load_experiment

    return load_experiment(file, overrides)


def existing_study(name: str, root: str) -> tuple[StudyFolder, Experiment]:
    """Return the folder and the experiment of a study, without importing its methods."""
    from heterokd.config.reading import read_study_experiment
    from heterokd.storage.workspace import open_workspace

    folder = open_workspace(root).existing_study(name)
    return folder, read_study_experiment(folder.experiment_file)


def print_json(content: object) -> None:
    """Print the JSON object of `--json`."""
    print(json.dumps(content, default=str))
