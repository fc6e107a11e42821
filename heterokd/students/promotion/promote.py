"""promote(): who is the challenger, what is measured, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import mlflow
import mlflow.pytorch
import torch
import torch.nn.functional as F
from filelock import FileLock
from mlflow.exceptions import MlflowException
from torch import nn

from heterokd.config.reading import load_study_experiment
from heterokd.config.recipe import Recipe
from heterokd.config.services import PromotionSettings
from heterokd.datasets.io.loaders import open_test
from heterokd.datasets.io.split import Splits
from heterokd.errors import CheckpointError, NetworkError, PromotionError
from heterokd.methods import BASELINE
from heterokd.networks.network import deployable
from heterokd.networks.student_costs import STUDENT_COSTS
from heterokd.storage.files import write_text
from heterokd.storage.study_dir import StudyFolder, TrialFolder
from heterokd.storage.trial_status import TrialStatus
from heterokd.storage.workspace import Workspace
from heterokd.students.export.export import try_export
from heterokd.students.promotion.aliases import CHAMPION, LINES, LOCK, last_line, previous_alias, rolled_back_tag
from heterokd.students.promotion.decision import Decision, Gate, PairedComparison, reason
from heterokd.students.promotion.model_card import Lineage, cache_of, model_card, shortened, teacher_of
from heterokd.students.promotion.served import ServingModel
from heterokd.students.registry import CHALLENGER, log_student, register, taken_size
from heterokd.tasks import TASKS
from heterokd.tracking.runs import StudyRuns
from heterokd.tracking.store import answering, current, first_line, open_store, pages, quiet
from heterokd.training.data import open_splits
from heterokd.training.evaluation import image_results
from heterokd.training.paired_tests import ImageResults
from heterokd.training.student import open_student
from heterokd.training.task_modules import Task, build_task, upsample

PARITY = 1e-4
"""Largest difference between a logit of the registered model and of the trained student."""
PARITY_IMAGES = 8


@dataclass(frozen=True)
class _Candidate:
    """The student that asks: its trial, its version (None: not registered), and the model that would be served."""

    trial: TrialFolder
    recipe: Recipe
    version: str | None
    model: nn.Module


def promote(
    root: Workspace,
    study_name: str,
    *,
    dry_run: bool = False,
    alias: str = CHAMPION,
    uri: str | None = None,
    trial: int | None = None,
) -> Decision:
    """Evaluate a study's challenger on the test split and, if every gate is passed, make it champion.

    Args:
        root: where state lives.
        study_name: a study that has a winner.
        dry_run: decide, but change nothing.
        alias: what the version gets; the version that had it becomes `previous` (`previous-ALIAS` for another alias).
        uri: of the tracking store; the experiment's own when left out.
        trial: of the study, in place of its winner: another member of the Pareto front, say.

    Raises:
        StudyError: there is no such study.
        PromotionError: it has no student to promote, or the champion cannot be compared with it.
        TrackingError: the store does not answer.
    """
    folder = root.existing_study(study_name)
    experiment = load_study_experiment(folder.experiment_file)
    uri = open_store(root, uri or experiment.tracking.uri)
    runs = StudyRuns(experiment, folder, uri, root.artifacts)
    with FileLock(root.path / LOCK), answering(uri), quiet(), current(uri):
        return _Promotion(runs, folder, root, alias, dry_run=dry_run, trial=trial).run()


class _Promotion:
    """One promotion, under the lock."""

    def __init__(
        self,
        runs: StudyRuns,
        folder: StudyFolder,
        root: Workspace,
        alias: str,
        *,
        dry_run: bool,
        trial: int | None = None,
    ) -> None:
        self.trial = trial
        self.runs, self.folder, self.root, self.alias, self.dry_run = runs, folder, root, alias, dry_run
        self.client = runs.client
        self.experiment = runs.experiment
        self.name = runs.experiment.registered_model
        self.summary = folder.summary

    def run(self) -> Decision:
        champion = self._version(self.alias)
        trial, version = self._challenger()
        holds = champion is not None and str(champion.version) == version
        if champion is not None and holds and self._tag_of_decision in champion.tags:
            return replace(Decision.from_json(champion.tags[self._tag_of_decision]), changed=False)
        splits = open_splits(self.experiment.data)
        candidate = self._open_challenger(trial, version, splits)
        if holds:
            # It was given the alias by hand: measured, and left at that.
            return replace(self._decide(candidate, None, splits), changed=False, promoted=True)
        decision = self._decide(candidate, champion, splits)
        if not self.dry_run and candidate.version is not None:
            self._keep(decision, candidate, champion, splits)
        return decision

    @property
    def _tag_of_decision(self) -> str:
        return "decision" if self.alias == CHAMPION else f"decision.{self.alias}"

    # --- who

    def _version(self, alias: str) -> Any | None:
        try:
            return self.client.get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _challenger(self) -> tuple[TrialFolder, str | None]:
        """The version with alias `challenger` if it is this study's, else the study's winner."""
        if self.trial is not None:
            return self._asked_for(self.trial)
        version = self._version(CHALLENGER)
        if version is not None and version.tags.get("study_id") == self.runs.study_id:
            return self.folder.trial(int(version.tags["trial"])), str(version.version)
        number = (self.summary.get("winner") or {}).get("number")
        if number is None:
            raise PromotionError(
                f"{self.folder.path}: the study {self.folder.name!r} has no trained student and the registry no "
                f"challenger of it; run `heterokd search` first (with --resume, if it was interrupted)"
            )
        trial = self.folder.trial(int(number))
        if not trial.weights.exists():
            raise PromotionError(f"{trial.weights}: the winner's weights are missing; run `heterokd search` again")
        return trial, self._newest_version(trial)

    def _asked_for(self, number: int) -> tuple[TrialFolder, str | None]:
        """The trial that the user names, trained to its end."""
        trial = self.folder.trial(number)
        if trial.status != TrialStatus.COMPLETE or not trial.weights.exists():
            leaders = ", ".join(str(one["number"]) for one in self.summary.get("leaders", ())) or "none"
            known = f"is {trial.status}" if trial.path.exists() else "does not exist"
            raise PromotionError(
                f"--trial {number}: trial {number} of study {self.folder.name!r} {known}, so there is no student of it "
                f"to promote; its leaders are {leaders}"
            )
        return trial, self._newest_version(trial)

    def _newest_version(self, trial: TrialFolder) -> str | None:
        """The last version in the registry that is of a trial; None when it was not registered."""
        versions = pages(
            lambda token: self.client.search_model_versions(f"name = '{self.name}'", max_results=1000, page_token=token)
        )
        of_study = [
            one
            for one in versions
            if one.tags.get("study_id") == self.runs.study_id
            and one.tags.get("trial") == str(trial.number)
            and one.tags.get("recipe") == trial.recipe.hash
        ]
        newest = max(of_study, key=lambda one: int(one.version), default=None)
        return None if newest is None else str(newest.version)

    def _open_challenger(self, trial: TrialFolder, version: str | None, splits: Splits) -> _Candidate:
        recipe = trial.recipe
        if version is None and self.dry_run:
            return _Candidate(
                trial, recipe, None, deployable(open_student(trial.recipe, trial.weights, splits.num_classes))
            )
        if version is None:
            version = register(self.runs, trial, log_student(self.runs, trial, splits), splits)
            if self.runs.is_new:
                # No search is logging to this store, so nobody else would close the study's run.
                self.runs.finish(self.summary)
        return _Candidate(trial, recipe, version, self._load(version, splits))

    def _load(self, version: str, splits: Splits) -> nn.Module:
        uri = f"models:/{self.name}/{version}"
        try:
            graph, size = mlflow.pytorch.load_model(uri), taken_size(uri)
        except (MlflowException, OSError, RuntimeError) as error:
            raise PromotionError(
                f"version {version} of {self.name!r} cannot be loaded ({first_line(error)}); "
                "remove it from the registry, or restore its files"
            ) from error
        return ServingModel(graph, self._task(splits), size)

    # --- figures

    def _decide(self, candidate: _Candidate, champion: Any | None, splits: Splits) -> Decision:
        settings = self.experiment.promotion
        task = self._task(splits)
        own = image_results(candidate.model, open_test(splits), task)
        gain = f"gain in test {task.facts.score_name}"
        comparison, first = None, Gate(gain, "-", None, None, f"no {BASELINE} trial to compare with")
        if champion is not None:
            other = self._champion_on_test(champion, splits, own)
            comparison = PairedComparison(f"{self.alias} (version {champion.version})", **asdict(own.compared(other)))
        else:
            baseline = self._baseline()
            if baseline is not None:
                other = image_results(
                    open_student(baseline.recipe, baseline.weights, splits.num_classes), open_test(splits), task
                )
                comparison = PairedComparison(f"{BASELINE} (trial {baseline.number})", **asdict(own.compared(other)))
        if comparison is not None:
            passed = comparison.gain > settings.min_gain
            required = f"> {settings.min_gain:g}"
            first = Gate(gain, required, comparison.gain, passed, f"over {comparison.against}")
        gates = (
            first,
            *self._limits(candidate, settings),
            self._parity(candidate, splits),
            self._exports(candidate, settings, splits),
            *self._rolled_back(candidate),
        )
        low, high = own.interval()
        failed = [gate for gate in gates if gate.passed is False]
        return Decision(
            study=self.experiment.name,
            model=self.name,
            alias=self.alias,
            promoted=not failed,
            changed=not failed and not self.dry_run,
            reason=reason(failed, comparison, task.facts.score, own.score, dry_run=self.dry_run),
            trial=candidate.trial.number,
            method=candidate.recipe.method,
            challenger=candidate.version,
            champion=None if champion is None else str(champion.version),
            metric=task.facts.score,
            test_score=own.score,
            test_images=len(own),
            test_digest=splits.test.digest,
            comparison=comparison,
            gates=gates,
            test_low=low,
            test_high=high,
        )

    def _task(self, splits: Splits) -> Task:
        data = self.experiment.data
        return build_task(data.task, splits.num_classes, window=data.window)

    def _champion_on_test(self, champion: Any, splits: Splits, challenger: ImageResults) -> ImageResults:
        """The champion on the test images, at its own size where its task's networks resize every image."""
        data = self.experiment.data
        who = f"the {self.alias} of {self.name!r} (version {champion.version})"
        signature = mlflow.models.get_model_info(f"models:/{self.name}/{champion.version}").signature
        if signature is None:
            raise PromotionError(f"{who} has no signature, so heterokd did not register it; remove the alias")
        size, logits = int(signature.inputs.inputs[0].shape[-1]), signature.outputs.inputs[0].shape
        task = next(one for one in TASKS.values() if len(one.logits_shape(1, (1, 1))) == len(logits) - 1)
        if task.name != data.task:
            raise PromotionError(
                f"{who} does {task.name}, this study {data.task}; "
                "give this experiment its own tracking.registered_model"
            )
        if int(logits[1]) != splits.num_classes:
            raise PromotionError(
                f"{who} knows {logits[1]} classes, {data.dataset} has {splits.num_classes}; "
                "give this experiment its own tracking.registered_model"
            )
        if champion.tags.get("dataset", data.dataset) != data.dataset:
            raise PromotionError(
                f"{who} is of data set {champion.tags['dataset']!r}, this study of {data.dataset!r}; "
                "give this experiment its own tracking.registered_model"
            )
        if champion.tags.get("data_seed", str(data.seed)) != str(data.seed):
            raise PromotionError(
                f"{who} was trained on another split (data.seed {champion.tags['data_seed']}, here {data.seed}) and "
                "may have seen these test images; use the same data.seed, or another tracking.registered_model"
            )
        seen = splits
        if task.resizes and size != data.image_size:
            seen = open_splits(data.model_copy(update={"image_size": size}))
        found = image_results(self._load(str(champion.version), splits), open_test(seen), self._task(splits))
        if not torch.equal(found.labels, challenger.labels):
            raise PromotionError(f"{who} cannot be compared: the test split at {size} pixels has other labels")
        return found

    def _baseline(self) -> TrialFolder | None:
        """The best scratch trial that left its weights."""
        number = (self.summary.get("scratch") or {}).get("number")
        if number is None:
            return None
        trial = self.folder.trial(int(number))
        if not trial.weights.exists():
            raise CheckpointError(
                f"{trial.weights}: the weights of the {BASELINE} baseline are missing; restore them, or run "
                "`heterokd search` again"
            )
        return trial

    def _limits(self, candidate: _Candidate, settings: PromotionSettings) -> Iterator[Gate]:
        limits = {name: limit for name, (_, limit) in settings.cost_limits.items()}
        size = candidate.recipe.data.view_size
        for name in dict.fromkeys(("params_m", "latency_ms", *limits)):
            cost = STUDENT_COSTS[name]()
            measured = cost.measure(candidate.model, size)
            yield _limited(cost.label(), limits.get(name), measured, cost.conditions(size))
        state = [*candidate.model.parameters(), *candidate.model.buffers()]
        size_mb = sum(tensor.numel() * tensor.element_size() for tensor in state) / 1e6
        yield _limited("weights in MB", settings.max_size_mb, size_mb)

    def _parity(self, candidate: _Candidate, splits: Splits) -> Gate:
        """Whether what would be served is what was trained."""
        name, required = "largest difference of a logit", f"<= {PARITY:g}"
        if not candidate.trial.weights.exists():
            return Gate(name, required, None, None, "the trial's weights are gone")
        student = open_student(candidate.trial.recipe, candidate.trial.weights, splits.num_classes)
        images = next(iter(open_test(splits))).images[:PARITY_IMAGES]
        if isinstance(candidate.model, ServingModel) and candidate.model.size is not None:
            # Cut or filled up to one window: the student would take a larger image at once.
            height, width = candidate.model.size
            images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        with torch.inference_mode():
            trained, served = student(images).logits, candidate.model(images)
            if trained.dim() == 4:
                trained = upsample(trained, served.shape[-2:])
            apart = float((trained - served).abs().max())
        return Gate(name, required, apart, apart <= PARITY, "registered model against trained student")

    def _exports(self, candidate: _Candidate, settings: PromotionSettings, splits: Splits) -> Gate:
        """Whether the student can be taken away as ONNX, and the file does what it does."""
        name = "largest difference of a logit after export to ONNX"
        if not settings.export_parity:
            return Gate(name, "-", None, None)
        if not candidate.trial.weights.exists():
            return Gate(name, "to agree", None, passed=False, note="the trial's weights are gone")
        student = open_student(candidate.trial.recipe, candidate.trial.weights, splits.num_classes)
        try:
            parity = try_export(student, splits, candidate.recipe.data.view_size, "onnx")
        except NetworkError as error:
            return Gate(name, "to agree", None, passed=False, note=str(error))
        note = "images of val, batch 1 and 5, ONNX Runtime"
        return Gate(name, f"<= {parity.tolerance:.3g}", parity.difference, parity.agrees, note)

    def _rolled_back(self, candidate: _Candidate) -> Iterator[Gate]:
        """A version that was taken back does not return by the next promotion."""
        if candidate.version is None:
            return
        tag = rolled_back_tag(self.alias)
        when = self.client.get_model_version(self.name, candidate.version).tags.get(tag)
        if when is not None:
            note = f"version {candidate.version} was taken back at {when}; delete its tag {tag!r} to let it try again"
            yield Gate("rolled back", "never", None, passed=False, note=note)

    # --- what is kept

    def _keep(self, decision: Decision, candidate: _Candidate, champion: Any | None, splits: Splits) -> None:
        """The record first, the alias last: a promotion that is cut off is repeated as a whole."""
        version = str(candidate.version)
        if self._is_recorded(decision):
            if not decision.promoted:
                return
        else:
            line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(decision)}
            with (self.folder.path / LINES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        tags = {
            self._tag_of_decision: decision.to_json(),
            "score": decision.metric,
            "test_score": f"{decision.test_score:.4f}",
            "test_digest": decision.test_digest,
            "data": splits.fingerprint,
        }
        if decision.promoted:
            tags["promoted_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, version, key, value)
        self._write_card(decision, candidate, splits)
        if decision.promoted:
            if champion is not None:
                self.client.set_registered_model_alias(self.name, previous_alias(self.alias), champion.version)
            self.client.set_registered_model_alias(self.name, self.alias, version)

    def _write_card(self, decision: Decision, candidate: _Candidate, splits: Splits) -> None:
        """The model card: the version's description, model_card.md of its run, and that of the study's folder."""
        version = self.client.get_model_version(self.name, str(candidate.version))
        run = self.client.get_run(str(version.run_id))
        logged = self.client.get_logged_model(str(version.source).removeprefix("models:/"))
        teacher, winner = teacher_of(self.summary, candidate.recipe), self.summary.get("winner") or {}
        lineage = Lineage(
            teacher=teacher,
            winner=winner if winner.get("number") == candidate.trial.number else {},
            cache=cache_of(candidate.recipe, splits, teacher.get("weights"), self.root),
            commit=run.data.tags.get("mlflow.source.git.commit"),
            weights=logged.tags.get("heterokd.weights", "unknown"),
        )
        taken = taken_size(f"models:/{self.name}/{version.version}")
        card = model_card(decision, candidate.recipe, splits, taken, lineage)
        write_text(self.folder.path / "model_card.md", card)
        self.client.log_text(run.info.run_id, card, "model_card.md")
        self.client.update_model_version(self.name, version.version, shortened(card))

    def _is_recorded(self, decision: Decision) -> bool:
        """Whether the last line says the same (figures of time apart)."""
        last, said = last_line(self.folder.path / LINES), asdict(decision)
        kept = ("alias", "promoted", "challenger", "champion", "test_digest", "test_score")
        same_gates = [(gate["name"], gate["required"], gate["passed"]) for gate in last.get("gates", ())] == [
            (gate["name"], gate["required"], gate["passed"]) for gate in said["gates"]
        ]
        return same_gates and all(last.get(key) == said[key] for key in kept)


def _limited(name: str, limit: float | None, measured: float, note: str = "") -> Gate:
    """The gate of a figure that may be at most `limit`."""
    passed = None if limit is None else measured <= limit
    return Gate(name, "-" if limit is None else f"<= {limit:g}", measured, passed, note)
