"""The file of weights in a folder of a trial, a study, an export or a download."""

from __future__ import annotations

from pathlib import Path

from heterokd.errors import CheckpointError, StudyError
from heterokd.storage.study_dir import StudyFolder
from heterokd.study.read_summary import read_summary

SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin")
PREFERRED = ("student.safetensors", "teacher.safetensors", "model.safetensors", "pytorch_model.bin", "state_dict.pth")
"""Names of weights in the folders of trials, teachers, exports, Hugging Face and MLflow's `log_state_dict`."""


def file_in_folder(key: str, folder: Path) -> Path | None:
    """Return the file of weights in a folder: of a study its winner's; None if there is none.

    Raises:
        CheckpointError: it has several files of weights, or is a trial without weights.
        StudyError: the study has no winner.
    """
    if (folder / "experiment.yaml").is_file():
        summary = read_summary(StudyFolder(folder))
        if summary is None or summary.winner is None:
            raise StudyError(f"{key}: the study {folder} has no winner; finish `heterokd search`, or name a trial")
        folder = StudyFolder(folder).trial(summary.winner.number).path
    names = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if (folder / "recipe.yaml").is_file() and "student.safetensors" not in names and "teacher.safetensors" not in names:
        raise CheckpointError(f"{key}: the trial {folder} has no weights, since it was not trained to the end")
    chosen = next((name for name in PREFERRED if name in names), names[0] if len(names) == 1 else None)
    if chosen is None and names:
        raise CheckpointError(f"{key}: {folder} holds {len(names)} files of weights ({', '.join(names[:4])}); name one")
    return None if chosen is None else folder / chosen
