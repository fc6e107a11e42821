"""Every file of a workspace, damaged: a command goes on, writes it again, or ends with a sentence that names it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from cached_views import built, small_key
from command_line import Done, Run
from golden_files import GOLDEN, unpack

from heterokd.config.reading import load_experiment
from heterokd.errors import UserError
from heterokd.execution.check import check_experiment, check_files, within_limits
from heterokd.storage.filesystem import open_folder
from heterokd.storage.workspace import Workspace
from heterokd.study.options import StudyOptions
from heterokd.study.search_space import open_space
from heterokd.study.storage import StudyFacts
from heterokd.study.stored_question import as_stored
from heterokd.study.study import Study
from heterokd.teachers.prepare import PreparedTeacher, prepare_teachers
from heterokd.tracking.runs import open_runs
from heterokd.tracking.store import existing_store
from heterokd.tracking.ui_views import study_links

MODEL = "models:/digits-student@champion"


def other_types(content: bytes) -> bytes | None:
    """A JSON object whose values have other types; None if the file is none."""
    try:
        known = json.loads(content)
        return json.dumps({key: 3 if isinstance(value, list) else ["x"] for key, value in known.items()}).encode()
    except (ValueError, AttributeError):
        return None


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "random": lambda content: random.Random(0).randbytes(max(64, min(len(content), 4096))),
    "an empty object": lambda content: b"{}",
    "other types": other_types,
}


@dataclass(frozen=True)
class Damaged:
    """A copy of a workspace with a file that a test damages."""

    root: Path
    cli: Run

    def report(self) -> Done:
        return self.cli("report", "finished", "--root", self.root, "--json")

    def compare(self) -> Done:
        return self.cli("compare", "finished", "--root", self.root)

    def promote(self) -> Done:
        return self.cli("promote", "finished", "--dry-run", "--root", self.root, "--json")

    def promote_again(self) -> Done:
        return self.cli("promote", "finished", "--trial", 2, "--root", self.root, "--json")

    def export_trial(self) -> Done:
        return self._export("studies/finished")

    def export_version(self) -> Done:
        return self._export(MODEL)

    def _export(self, student: str) -> Done:
        out = self.root.parent / "out"
        return self.cli("export", student, "--format", "safetensors", "--out", out, "--root", self.root)

    def verify(self) -> Done:
        return self.cli("cache", "--verify", "--root", self.root)

    def links(self) -> Done:
        """What `heterokd ui` prints."""
        workspace = Workspace(self.root)
        return said(lambda: study_links(workspace, existing_store(workspace, None), "http://127.0.0.1:5000", None))

    def resume(self) -> Done:
        """What `heterokd search --resume` does before and after Ray runs the trials."""

        def run() -> None:
            workspace = Workspace(self.root)
            folder = workspace.study("finished")
            asked = as_stored(load_experiment(GOLDEN / "finished.yaml"), folder)
            experiment, candidates = within_limits(asked, workspace)
            excluded = check_experiment(experiment)
            check_files(experiment, workspace)
            runs = open_runs(experiment, folder, workspace)
            prepare_teachers(experiment, workspace)
            space = open_space(asked, folder, StudyFacts(excluded, candidates.left_out, candidates.costs))
            study = Study.open(asked, folder, StudyOptions(space=space))
            study.next()
            summary = study.summary()
            runs.close_zombies()
            for trial in folder.trials():
                runs.sync(trial)
            runs.finish(summary)

        return said(run)


def said(work: Callable[[], object]) -> Done:
    """How the command line ends after some work; any other exception than one with a sentence is raised."""
    try:
        work()
    except UserError as error:
        return Done(2, "", f"error: {error}\n")
    return Done(0, "", "")


STUDY, TRIAL, TEACHER = "studies/finished/", "studies/finished/trials/0002/", "teachers/*/"
LOGGED = "artifacts/models/*/artifacts/"
READERS: dict[str, tuple[str, ...]] = {
    f"{TEACHER}teacher.json": ("resume",),
    f"{TEACHER}teacher.safetensors": ("resume",),
    f"{TEACHER}recipe.yaml": ("resume",),
    f"{STUDY}experiment.yaml": ("report", "compare", "resume", "promote", "export_trial", "links"),
    f"{STUDY}study.db": ("report", "resume", "links"),
    f"{STUDY}summary.json": ("report", "resume", "promote", "export_trial", "links"),
    f"{STUDY}measured.json": ("report",),
    f"{STUDY}pictures/captions.json": ("report",),
    f"{STUDY}promotions.jsonl": ("promote", "promote_again"),
    f"{STUDY}tracking.json": ("resume", "promote", "links"),
    f"{TRIAL}trial.json": ("compare", "resume", "promote", "export_trial"),
    f"{TRIAL}recipe.yaml": ("compare", "resume", "promote", "export_trial"),
    f"{TRIAL}metrics.jsonl": ("compare", "resume", "promote"),
    f"{TRIAL}student.safetensors": ("resume", "promote", "export_trial"),
    f"{TRIAL}checkpoint.pt": ("resume", "promote"),
    "students.json": ("links", "promote", "export_version"),
    "mlflow.db": ("links", "promote", "export_version"),
    f"{LOGGED}MLmodel": ("promote", "export_version"),
    f"{LOGGED}data/model.pt2": ("promote", "export_version"),
    "artifacts/*/artifacts/weights/student.json": ("export_version",),
    "artifacts/*/artifacts/weights/student.safetensors": ("export_version",),
    "artifacts/*/artifacts/weights/recipe.yaml": ("export_version",),
    "caches/*/key.json": ("verify",),
    "caches/*/manifest.json": ("verify",),
    "caches/*/shards/*": ("verify",),
}
"""Commands that read a file."""

QUICK = {f"{TEACHER}teacher.json", "caches/*/manifest.json"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study, promoted twice, and a cache."""
    root = unpack("finished", tmp_path_factory.mktemp("whole"))
    built(open_folder(root / "caches"), small_key())
    return root


@contextmanager
def copied(whole: Path) -> Iterator[Path]:
    """The workspace with all changes undone afterwards; at the same place, which MLflow's store holds."""
    kept = whole.with_name("kept")
    shutil.copytree(whole, kept)
    try:
        yield whole
    finally:
        shutil.rmtree(whole)
        kept.rename(whole)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in READERS]
)
def test_a_damaged_file_is_written_again_or_named(whole: Path, cli: Run, name: str) -> None:
    for damage, damaged in DAMAGES.items():
        for reader in READERS[name]:
            with copied(whole) as root:
                files = sorted(root.glob(name))
                assert files, f"no command wrote {name}"
                for file in files:
                    content = damaged(file.read_bytes())
                    if content is not None:
                        file.write_bytes(content)
                done = getattr(Damaged(root, cli), reader)()
                case = f"{reader} with {damage}: {done.err}"
                assert done.code in (0, 1, 2), case
                assert "Traceback" not in done.err, case
                if done.code:
                    last = done.err.splitlines()[-1] if done.err else done.out
                    assert any(str(file) in last or file.parent.name in last for file in files), case


def test_a_teachers_card_is_measured_again(whole: Path, cli: Run, caplog: pytest.LogCaptureFixture) -> None:
    with copied(whole) as root:
        (card,) = root.glob("teachers/*/teacher.json")
        before = json.loads(card.read_text())
        prepare: Callable[[], dict[str, PreparedTeacher]] = partial(
            prepare_teachers, load_experiment(GOLDEN / "finished.yaml"), Workspace(root)
        )
        for damaged in DAMAGES.values():
            card.write_bytes(damaged(json.dumps(before).encode()) or b"")
            caplog.clear()
            (teacher,) = prepare().values()
            assert not teacher.fitted
            assert f"{card}: is damaged; the teacher is measured, and the file is written again" in caplog.messages
            after = json.loads(card.read_text())
            assert {key: after[key] for key in before if key != "reason"} == before
        caplog.clear()
        prepare()
        assert not any("is damaged" in message for message in caplog.messages)
