"""Checks of a method: each yields a sentence per fault that it finds for a pair."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from heterokd.domains import Choice, domains
from heterokd.errors import MissingSignal, PairError
from heterokd.method import Method, MethodParams
from heterokd.methods.conformance.random_pairs import (
    SIGNALS,
    STUDENTS,
    TEACHERS,
    UNLIKE_PAIRS,
    Pair,
    both_outputs,
    has_gradient,
    leaves,
    pairs_of,
    random_batch,
)
from heterokd.outputs import IGNORE, UNLABELLED, Losses, Signal
from heterokd.tasks import task_of

Check = Callable[[type[Method], Pair], Iterator[str]]


def build(kind: type[Method], pair: Pair, seed: int = 0) -> Method:
    """Build a method with its default parameters.

    Raises:
        PairError: it cannot exist for the pair.
    """
    torch.manual_seed(seed)
    return kind(None, STUDENTS[pair[0]], TEACHERS[pair[1]])


def run(
    method: Method, pair: Pair, progress: float = 1.0, soft: bool = False, dtype: torch.dtype = torch.float32
) -> Losses:
    """The method's terms on random outputs that hold nothing but what it declares."""
    student, teacher = both_outputs(pair, dtype)
    declared = student.only(method.student_needs), teacher.only(method.teacher_needs)
    terms: Losses = method(*declared, random_batch(pair, soft=soft), progress)
    return terms


def wrong_terms(terms: Losses) -> Iterator[str]:
    """What keeps terms from being finite scalars with short names."""
    for name, value in terms.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            yield f"term {name!r} is not a lower-case name"
        if value.shape != ():
            yield f"term {name!r} has shape {tuple(value.shape)}, not that of a scalar"
        elif value.dtype != torch.float32:
            yield f"term {name!r} is {value.dtype}, not float32"
        elif not torch.isfinite(value):
            yield f"term {name!r} is {value.item()}"


# --- on every pair


def finite_terms(kind: type[Method], pair: Pair) -> Iterator[str]:
    """Terms are finite scalars, and the declared signals suffice for them."""
    method = build(kind, pair)
    for owner in ("student_needs", "teacher_needs"):
        if getattr(method, owner) & ~getattr(kind, owner):
            yield f"`build` widens {owner} of the class; it may only narrow it"
    yield from wrong_terms(run(method, pair))


def gradients(kind: type[Method], pair: Pair) -> Iterator[str]:
    """The gradient reaches the student and all projectors, and nothing of the teacher."""
    method = build(kind, pair)
    student, teacher = both_outputs(pair)
    terms = method(student.only(method.student_needs), teacher.only(method.teacher_needs), random_batch(pair), 0.9)
    if not terms:
        yield "`forward` returns no term"
        return
    torch.autograd.backward(torch.stack(list(terms.values())).sum())
    for signal in SIGNALS:
        if signal in method.student_needs and not any(has_gradient(leaf) for leaf in leaves(student, signal)):
            yield f"no gradient reaches the student's {signal.name}"
    for key, weight in method.named_parameters():
        if not has_gradient(weight):
            yield f"no gradient reaches the method's weight {key}"
    for signal in teacher.serves:
        if any(leaf.grad is not None for leaf in leaves(teacher, signal)):
            yield f"a gradient reaches the teacher's {signal.name}; detach it"


def builds_without_memory(kind: type[Method], pair: Pair) -> Iterator[str]:
    """A method can be built on the meta device, with the same shapes."""
    real = build(kind, pair).state_dict()
    with torch.device("meta"):
        method = build(kind, pair)
    for key, weight in method.named_parameters():
        if not weight.is_meta:
            yield f"weight {key} is not made on the current device; make it without naming a device"
    if {key: value.shape for key, value in method.state_dict().items()} != {
        key: value.shape for key, value in real.items()
    }:
        yield "on the meta device its state has other shapes"


# --- on unlike pairs


def reads_what_it_declares(kind: type[Method], pair: Pair) -> Iterator[str]:
    """Every declared signal is read: what is not read need not be computed, cached or demanded of a network."""
    method = build(kind, pair)
    student, teacher = both_outputs(pair)
    for owner, needs in (("student", method.student_needs), ("teacher", method.teacher_needs)):
        for signal in SIGNALS:
            if signal not in needs:
                continue
            students = student.only(method.student_needs & ~signal if owner == "student" else method.student_needs)
            teachers = teacher.only(method.teacher_needs & ~signal if owner == "teacher" else method.teacher_needs)
            sentence = rf"{owner}\.\w+ was read .* add Signal\.{signal.name} to {owner}_needs"
            try:
                method(students, teachers, random_batch(pair), 1.0)
            except MissingSignal as error:
                if re.search(sentence, str(error)):
                    continue
                raise
            yield f"{owner}_needs declares Signal.{signal.name}, which is never read; take it out"


def same_terms_at_every_progress(kind: type[Method], pair: Pair) -> Iterator[str]:
    """Terms are finite at every progress, and the same ones: curves need them from the first step on."""
    names = run(build(kind, pair), pair).keys()
    for progress in (0.0, 0.5, 1.0):
        terms = run(build(kind, pair), pair, progress=progress)
        yield from wrong_terms(terms)
        if terms.keys() != names:
            yield f"at progress {progress:g} the terms are {', '.join(terms)}, at its end {', '.join(names)}"


def soft_labels(kind: type[Method], pair: Pair) -> Iterator[str]:
    """Labels may be shares of classes, as mixup makes them; in segmentation a batch may have none at all."""
    method = build(kind, pair)
    if not task_of(STUDENTS[pair[0]]).labels_are_maps:
        yield from wrong_terms(run(method, pair, soft=True))
        return
    student, teacher = both_outputs(pair)
    batch = random_batch(pair)
    ignored = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    terms = method(student.only(method.student_needs), teacher.only(method.teacher_needs), ignored, 0.9)
    yield from wrong_terms(terms)
    if not terms:
        return
    torch.autograd.backward(torch.stack(list(terms.values())).sum())
    found = [leaf.grad for signal in student.serves for leaf in leaves(student, signal)]
    found += [weight.grad for weight in method.parameters()]
    if not all(gradient is None or bool(gradient.isfinite().all()) for gradient in found):
        yield "without a label in the whole batch its gradient is not finite"


def labels_as_declared(kind: type[Method], pair: Pair) -> Iterator[str]:
    """Images may have no label; `reads_labels` says which terms do not learn from them."""
    if task_of(STUDENTS[pair[0]]).labels_are_maps:
        return
    batch, method = random_batch(pair), build(kind, pair)
    labelled = torch.arange(len(batch)) % 2 == 0
    labels = batch.labels.where(labelled, UNLABELLED)
    student, teacher = both_outputs(pair)
    given = student.only(method.student_needs), teacher.only(method.teacher_needs)
    terms = method.terms(*given, replace(batch, labels=labels, labelled=labelled, labelled_share=0.5), 0.9)
    yield from wrong_terms(terms)
    if not terms:
        return
    torch.autograd.backward(torch.stack(list(terms.values())).sum())
    read = [leaf for signal in SIGNALS if signal in method.student_needs for leaf in leaves(student, signal)]
    learned = any(
        bool(leaf.grad[~labelled].any()) for leaf in read if leaf.grad is not None and len(leaf) == len(batch)
    )
    if kind.reads_labels != "all" and not learned:
        yield f"reads_labels is {kind.reads_labels!r}, but nothing is learned from images without a label"
    first = build(kind, pair)(*given, batch, 0.9)
    second = build(kind, pair)(*given, replace(batch, labels=torch.zeros_like(batch.labels)), 0.9)
    changed = sorted(name for name, value in first.items() if not torch.equal(value, second[name]))
    if bool(changed) != (kind.reads_labels != "none"):
        yield f"reads_labels is {kind.reads_labels!r}, but labels change {', '.join(changed) or 'no term'}"


def bfloat16(kind: type[Method], pair: Pair) -> Iterator[str]:
    """Outputs in bfloat16, which come from autocast alone, give float32 terms."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield from wrong_terms(run(build(kind, pair), pair, dtype=torch.bfloat16))


def large_outputs(kind: type[Method], pair: Pair) -> Iterator[str]:
    """Outputs a thousand times as large give finite terms."""
    method = build(kind, pair)
    student, teacher = (outputs.map(lambda tensor: tensor.detach() * 1e3) for outputs in both_outputs(pair))
    yield from wrong_terms(method(student, teacher, random_batch(pair), 1.0))


def repeated_images(kind: type[Method], pair: Pair) -> Iterator[str]:
    """A batch may hold an image twice, also in the same view, as balanced sampling makes it."""
    method = build(kind, pair)
    student, teacher = both_outputs(pair)
    batch = random_batch(pair)
    places = torch.arange(len(batch))
    places[1] = 0
    twice = replace(batch, images=batch.images[places], labels=batch.labels[places], index=batch.index[places])
    both = (
        outputs.map(lambda values: values[places] if values.dim() > 1 else values) for outputs in (student, teacher)
    )
    terms = method(*(outputs.only(needs) for outputs, needs in zip(both, _needs(method), strict=True)), twice, 0.9)
    yield from wrong_terms(terms)
    torch.autograd.backward(torch.stack(list(terms.values())).sum())
    for signal in student.serves:
        for leaf in leaves(student, signal):
            if leaf.grad is not None and not bool(leaf.grad.isfinite().all()):
                yield f"the gradient of the student's {signal.name} is not finite"


def _needs(method: Method) -> tuple[Signal, Signal]:
    return method.student_needs, method.teacher_needs


def repeatable(kind: type[Method], pair: Pair) -> Iterator[str]:
    """The same inputs give the same terms, also after a round trip through `state_dict`."""
    method, other = build(kind, pair, seed=0), build(kind, pair, seed=1)
    twin = copy.deepcopy(method)
    other.load_state_dict(method.state_dict())
    terms = run(method, pair)
    if run(twin, pair) != terms:
        yield "the same inputs give other terms; draw random numbers from a generator that is seeded by the batch"
    if run(other, pair) != terms:
        yield "a copy by state_dict gives other terms; keep what decides them in parameters and buffers"


def learns(kind: type[Method], pair: Pair) -> Iterator[str]:
    """The loss falls when the student's outputs and the method's weights follow its gradient."""
    method = build(kind, pair)
    student, teacher = both_outputs(pair)
    weights = [leaf for signal in SIGNALS if signal in method.student_needs for leaf in leaves(student, signal)]
    optimizer = torch.optim.Adam([*weights, *method.parameters()], lr=LEARNING_RATE)
    batch, values = random_batch(pair), []
    for _ in range(STEPS):
        terms = method(student.only(method.student_needs), teacher.only(method.teacher_needs), batch, 1.0)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        values.append(loss.item())
    if not values[-1] < values[0]:
        yield f"following its gradient for {STEPS} steps its loss goes from {values[0]:.4g} to {values[-1]:.4g}"


STEPS, LEARNING_RATE = 20, 0.02

ON_EVERY_PAIR: tuple[Check, ...] = (finite_terms, gradients, builds_without_memory)
ON_UNLIKE_PAIRS: tuple[Check, ...] = (
    reads_what_it_declares,
    same_terms_at_every_progress,
    soft_labels,
    labels_as_declared,
    bfloat16,
    large_outputs,
    repeated_images,
    repeatable,
    learns,
)


# --- parameters, and all together


def wrong_parameters(kind: type[Method]) -> Iterator[str]:
    """Parameters have a sentence each, and their domains hold the default and work at both ends."""
    found = domains(kind.Params)
    defaults = kind.Params()
    for name, field in kind.Params.model_fields.items():
        if not (field.description or "").strip():
            yield f"parameter {name} has no description"
        if name in found and getattr(defaults, name) not in found[name]:
            yield f"parameter {name}: the default {getattr(defaults, name)!r} is outside its domain, {found[name]}"
    for name, domain in found.items():
        for value in domain.options if isinstance(domain, Choice) else (domain.low, domain.high):
            for problem in _wrong_value(kind, kind.Params.model_validate({name: value})):
                yield f"with {name} = {value!r}: {problem}"


FIRST_PAIRS = (("cnn", "isotropic"), ("cnn", "cnn"))


def _wrong_value(kind: type[Method], params: MethodParams) -> Iterator[str]:
    """On the first pair of each task that the parameters exist for."""
    for task in sorted(kind.tasks):
        for pair in [pair for pair in FIRST_PAIRS if pair in pairs_of(task)] or pairs_of(task):
            try:
                method = kind(params, STUDENTS[pair[0]], TEACHERS[pair[1]])
            except PairError:
                continue
            yield from wrong_terms(run(method, pair))
            break


def check_method(kind: type[Method]) -> list[str]:
    """Run every check on a method; return sentences for each that fails, about the first pair where it does.

    An exception that a method raises is such a sentence. Where terms are not finite scalars, nothing else is checked.
    """
    problems: list[str] = []
    for task in sorted(kind.tasks):
        pairs = pairs_of(task)
        unlike = [pair for pair in UNLIKE_PAIRS if pair in pairs]
        if all(_is_refused(kind, pair) for pair in unlike):
            problems.append(f"{task}: it refuses every pair of unlike networks")
        first = _first_problems(finite_terms, kind, pairs)
        problems += first
        for check in () if first else (*ON_EVERY_PAIR[1:], *ON_UNLIKE_PAIRS):
            problems += _first_problems(check, kind, pairs if check in ON_EVERY_PAIR else unlike)
    return problems or _sentences("parameters", lambda: wrong_parameters(kind))


def _first_problems(check: Check, kind: type[Method], pairs: list[Pair]) -> list[str]:
    for pair in pairs:
        name = f"{check.__name__}, {pair[0]} student of {pair[1]} teacher"
        if found := _sentences(name, lambda pair=pair: check(kind, pair)):  # type: ignore[misc]
            return found
    return []


def _is_refused(kind: type[Method], pair: Pair) -> bool:
    try:
        build(kind, pair)
    except PairError:
        return True
    except Exception:  # noqa: BLE001  the checks say what it is
        return False
    return False


def _sentences(name: str, check: Callable[[], Iterator[str]]) -> list[str]:
    try:
        return [f"{name}: {problem}" for problem in check()]
    except PairError:
        return []  # the method refuses this pair
    except Exception as error:  # noqa: BLE001  whatever a method raises
        return [f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"]
