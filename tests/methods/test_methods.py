"""What every method owes its callers, checked on every file of `heterokd/methods/`: a new file needs no edit here.

The checks are those of `heterokd.methods.conformance`; each runs once for every task of a method, on pairs of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterable
from typing import Annotated

import pytest
import torch
from pydantic import Field

from heterokd.domains import Float, domains
from heterokd.errors import PairError
from heterokd.method import Method, MethodParams, StageSimilarity, summary
from heterokd.methods import BASELINE, METHODS, ONE_OF_EACH_KIND, VANILLA_KD
from heterokd.methods.conformance import checks
from heterokd.methods.conformance.checks import ON_EVERY_PAIR, ON_UNLIKE_PAIRS, Check, check_method
from heterokd.methods.conformance.random_pairs import PAIRS, STUDENTS, TEACHERS, UNLIKE_PAIRS, Pair, pairs_of
from heterokd.outputs import Batch, Losses, Outputs, OutputSpec, Signal, hard_labels
from heterokd.tasks import task_of

BASELINES = {BASELINE}  # distils nothing: no equation, no paper, nothing to search
DISTILLATIONS = [name for name in METHODS if name not in BASELINES]
NEEDS_TERMS = {checks.gradients, checks.large_outputs, checks.learns, checks.repeated_images}
every_method = pytest.mark.parametrize("name", METHODS)
every_distillation = pytest.mark.parametrize("name", DISTILLATIONS)
of_every_task = pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name in DISTILLATIONS for task in sorted(METHODS[name].tasks)]
)


@functools.cache
def quick_pairs(name: str) -> frozenset[Pair]:
    """The pairs with which `make test` tries a method: the first of each of its tasks that it does not refuse."""
    found: dict[str, Pair] = {}
    for pair in [*UNLIKE_PAIRS, *PAIRS]:
        task = task_of(STUDENTS[pair[0]]).name
        if task in METHODS[name].tasks - found.keys():
            with torch.device("meta"), contextlib.suppress(PairError):
                METHODS[name](None, STUDENTS[pair[0]], TEACHERS[pair[1]])
                found[task] = pair
    return frozenset(found.values())


def cases(on: Iterable[Check], pairs: Iterable[Pair]) -> list[object]:
    """Every check and method with every pair of a task that the method declares."""
    return [
        pytest.param(
            check,
            name,
            pair,
            id=f"{check.__name__}-{name}-{'<-'.join(pair)}",
            marks=[] if pair in quick_pairs(name) else pytest.mark.thorough,
        )
        for check in on
        for name in (DISTILLATIONS if check in NEEDS_TERMS else METHODS)
        for pair in pairs
        if task_of(STUDENTS[pair[0]]).name in METHODS[name].tasks
    ]


@pytest.mark.parametrize(
    ("check", "name", "pair"), [*cases(ON_EVERY_PAIR, PAIRS), *cases(ON_UNLIKE_PAIRS, UNLIKE_PAIRS)]
)
def test_conforms(check: Check, name: str, pair: Pair) -> None:
    try:
        assert not list(check(METHODS[name], pair))
    except PairError as error:
        pytest.skip(f"{name} refuses {pair[0]} <- {pair[1]}: {error}")


@of_every_task
def test_exists_for_an_unlike_pair(name: str, task: str) -> None:
    refused = 0
    for pair in pairs_of(task):
        try:
            METHODS[name](None, STUDENTS[pair[0]], TEACHERS[pair[1]])
        except PairError:
            refused += STUDENTS[pair[0]].kind != TEACHERS[pair[1]].kind
    unlike = sum(STUDENTS[student].kind != TEACHERS[teacher].kind for student, teacher in pairs_of(task))
    assert refused < unlike


@every_method
def test_parameters_are_described_and_searchable_at_both_ends(name: str) -> None:
    assert not list(checks.wrong_parameters(METHODS[name]))
    searched = bool(domains(METHODS[name].Params))
    assert searched is (name not in BASELINES), "a method without a searched parameter cannot be tuned"


# --- the checks themselves


class Sound(Method):
    """Match logits; what follows does one thing wrong each."""

    class Params(MethodParams):
        """One weight."""

        weight: Annotated[float, Float(0.1, 10)] = Field(1.0, description="multiplies the term")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        return {"logit": (student.logits.float() - teacher.logits.detach().float()).square().mean()}


class BadTerms(Sound):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        return {"Bad": student.logits.mean(), "vector": student.logits.mean(dim=0)}


class UnusedWeight(Sound):
    def build(self, student: OutputSpec, teacher: OutputSpec) -> None:
        self.unused = torch.nn.Parameter(torch.zeros(3, device="cpu"))


class Undetached(Sound):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        return {"logit": (student.logits.float() - teacher.logits.float()).square().mean()}


class Greedy(Sound):
    student_needs = Signal.LOGITS | Signal.EMBEDDING


class Late(Sound):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        terms = super().forward(student, teacher, batch, progress)
        return terms if progress < 1 else {**terms, "late": terms["logit"]}


class Overflowing(Sound):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        return {"logit": student.logits.float().exp().mean()}


class Random(Sound):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        return {"logit": torch.rand(()) * super().forward(student, teacher, batch, progress)["logit"]}


class Unlearning(Sound):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        noise = student.logits - student.logits.detach()
        return {"logit": super().forward(student, teacher, batch, progress)["logit"].detach() - noise.sum()}


class ReadsLabels(Sound):
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, progress: float) -> Losses:
        distance = (student.logits.float() - teacher.logits.detach().float()).square().mean(dim=1)
        return {"logit": (distance * (1 + hard_labels(batch.labels))).mean()}


class Undescribed(Sound):
    class Params(MethodParams):
        """One weight, outside its domain."""

        weight: Annotated[float, Float(2, 10)] = 1.0


@pytest.mark.parametrize(
    ("method", "sentences"),
    [
        (Sound, ()),
        (BadTerms, ("term 'Bad' is not a lower-case name", "term 'vector' has shape (10,), not that of a scalar")),
        (UnusedWeight, ("no gradient reaches the method's weight unused", "weight unused is not made on the current")),
        (Undetached, ("a gradient reaches the teacher's LOGITS; detach it",)),
        (Greedy, ("no gradient reaches the student's EMBEDDING", "declares Signal.EMBEDDING, which is never read")),
        (Late, ("at progress 0 the terms are logit, at its end logit, late",)),
        (Overflowing, ("large_outputs, cnn student of isotropic teacher: term 'logit' is inf",)),
        (Random, ("the same inputs give other terms",)),
        (Unlearning, ("following its gradient for 20 steps its loss goes from",)),
        (ReadsLabels, ("reads_labels is 'none', but labels change logit",)),
        (Undescribed, ("weight has no description", "the default 1.0 is outside its domain, 2 to 10")),
    ],
)
def test_checks_find_what_is_wrong(method: type[Method], sentences: tuple[str, ...]) -> None:
    found = check_method(method)
    assert bool(found) == bool(sentences), found
    for sentence in sentences:
        assert any(sentence in problem for problem in found), found


# --- what drivers ask -----------------------------------------------------------------------------------------------


@every_method
def test_what_a_method_says_of_itself_holds(name: str) -> None:
    method = METHODS[name]
    values = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).tolist()
    settings = method.initial_settings(StageSimilarity(values, "cnn", "attention"))
    assert method.has_initial_settings is bool(settings)
    for some in settings:
        method.Params.model_validate(some)
    assert method.has_figure is (method.figure is not Method.figure)
    method.Params.model_validate(method.gather_settings())


def test_named_methods_are_what_they_are_named_for() -> None:
    assert [name for name in METHODS if METHODS[name].teacher_needs == Signal.NONE] == [BASELINE]
    for task, name in VANILLA_KD.items():
        assert task in METHODS[name].tasks
        assert METHODS[name].teacher_needs == Signal.LOGITS
    assert all("classification" in METHODS[name].tasks for name in ONE_OF_EACH_KIND)


# --- the files -----------------------------------------------------------------------------------------------------


@every_method
def test_file_says_where_it_comes_from(name: str) -> None:
    module = importlib.import_module(f"heterokd.methods.{name}")
    assert module.__doc__
    assert summary(METHODS[name]).endswith(".")
    spelled = name.replace("_", "")
    assert METHODS[name].__name__.lower() == spelled, "the class is spelled as in the paper, the file in lower case"
    if name not in BASELINES:
        assert "https://" in module.__doc__, "a method cites its paper"


@every_distillation
def test_equation_is_a_public_function_of_tensors(name: str) -> None:
    module = importlib.import_module(f"heterokd.methods.{name}")
    function = getattr(module, f"{name}_loss")
    assert next(iter(inspect.signature(function).parameters)).startswith("student")
    assert inspect.getdoc(function)


def test_methods_import_no_heavy_library() -> None:
    code = (
        "import sys, heterokd.methods;"
        "print(sorted({'ray', 'optuna', 'mlflow', 'timm', 'pyarrow', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
