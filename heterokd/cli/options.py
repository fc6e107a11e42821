"""Options that commands share, and what every command does with them."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from heterokd.config.experiment import Experiment

READING = ("cache", "compare", "doctor", "plan")
"""Commands that leave the root as it is; a cache that is built or pruned looks for itself."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk that is full."""

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="YAML file of the experiment.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace one key, e.g. search.trials=50.")
]


def _usable(context: typer.Context, root: str) -> str:
    """Refuse a root that nothing can be written to, before there is anything to be written."""
    check_root(root, written=context.info_name not in READING)
    return root


def check_root(root: str, *, written: bool) -> None:
    """Refuse a root that is no folder, or that cannot be written to although it has to be."""
    if "://" in root:  # a store answers for itself when it is opened
        return
    place = Path(root)
    try:
        while not place.exists():
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
        help="Holds all state: a folder, or s3://, gs:// or file://.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object last.")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study (the experiment's name).")]


def program_began() -> float:
    """When this program was started."""
    import psutil

    return float(psutil.Process().create_time())


def load_asked(file: Path, overrides: list[str]) -> Experiment:
    """The experiment of a file, with keys replaced."""
    from heterokd.config.reading import load_experiment

    return load_experiment(file, overrides)


def existing_study(name: str, root: str) -> tuple[Any, Experiment]:
    """The folder of a study that is there, and its question."""
    from heterokd.config.reading import load_experiment
    from heterokd.storage.workspace import open_workspace

    folder = open_workspace(root).existing_study(name)
    return folder, load_experiment(folder.experiment_file)


def print_json(content: object) -> None:
    """The one JSON object of `--json`."""
    print(json.dumps(content, default=str))
