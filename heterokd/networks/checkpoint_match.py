"""Find a network's weights in the content of a checkpoint: nested, with prefixes, or with names of other projects."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from heterokd.networks.checkpoint_file import CheckpointFile
from heterokd.networks.openmmlab import STAGE_NORM, has_stage_norm, is_segformer
from heterokd.networks.openmmlab import converted as converted_segformer

State = Mapping[str, Tensor]

EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema", "teacher")
"""Names of averaged weights, which are preferred, as by timm; `teacher` is the average in DINO's checkpoints."""
PLAIN_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "student",
    "weights",
    "params",
)
_OF_TRAINING = ("optim", "scheduler", "lr_sched", "scaler", "amp", "loops", "callbacks")
"""Beginnings of the names of other training states."""
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_forward_module\.")
"""Names that torch.compile, FSDP and others insert anywhere in a name."""
_DEEPEST = 4
_STATISTICS = ("running_mean", "running_var")
_WITHOUT_EFFECT = (
    *("num_batches_tracked", "n_averaged", "total_ops", "total_params", "attn_mask", "relative_position_index"),
    *("relative_coords_table", "relative_position_bias", "position_ids"),
)
"""Last parts of names that no trained weight has: counters, and tables that the network computes."""


@dataclass(frozen=True)
class Target:
    """The network that weights are wanted for.

    Attributes:
        body: module whose state dict is wanted.
        buffers: names of its buffers.
        heads: names of the weights of its last classifier.
        num_classes: K of its logits.
    """

    body: nn.Module
    buffers: frozenset[str]
    heads: frozenset[str]
    num_classes: int

    @property
    def state(self) -> State:
        """The wanted state dict."""
        return cast(State, self.body.state_dict())


@dataclass(frozen=True)
class Match:
    """Weights of a checkpoint by the network's names.

    Attributes:
        state: weights; without those of the classifier if its number of classes differs.
        classes: the file's number of classes; 0 if it has no classifier.
        notes: what was chosen, renamed, converted or left out, as phrases.
        fault: why the weights are not the network's, or None.
        by_order: whether names were matched by order, which a forward has to verify.
    """

    state: dict[str, Tensor]
    classes: int
    notes: tuple[str, ...] = ()
    fault: str | None = None
    by_order: bool = False


def match_checkpoint(file: CheckpointFile, target: Target) -> Match:
    """Match a checkpoint's tensors with a network's: by name, by timm's conversion, then by order and shape."""
    wanted = target.state
    found = list(_state_dicts(file.content))
    if not found:
        return Match({}, 0, fault="the file holds no tensors by name")
    by_name = [_chosen(key, tensors, wanted, several=len(found) > 1) for key, tensors in found]
    best = max(by_name, key=lambda choice: choice.rank)  # the first of equals
    direct = _checked(best, target)
    if direct.fault is None:
        return direct
    if is_segformer(best.tensors) and any(name.startswith("encoder.block1.") for name in wanted):
        return _converted_segformer(best, target)
    converted = _converted_by_timm(best, target)
    if converted is not None and converted.fault is None:
        return converted
    for choice in sorted(by_name, key=lambda each: each.preference, reverse=True) if file.ordered else ():
        ordered = _by_order(choice, target)
        if ordered is not None:
            return ordered
    return direct


@dataclass(frozen=True)
class _Choice:
    """A state dict of a checkpoint, with a prefix removed."""

    key: str
    tensors: dict[str, Tensor]
    prefix: str
    matching: int
    others: tuple[str, ...]
    several: bool

    @property
    def preference(self) -> int:
        """2 for averaged weights, 1 for the usual names, 0 for others."""
        parts = f"{self.key}.{self.prefix}".split(".")
        return 2 if set(parts) & set(EMA_KEYS) else 1 if set(parts) & set(PLAIN_KEYS) else 0

    @property
    def rank(self) -> tuple[int, int]:
        return self.matching, self.preference

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self.key:
            notes.append(f"read from {self.key!r} of the file" + (", of several" if self.several else ""))
        if self.prefix:
            notes.append(f"prefix {self.prefix!r} removed from the names")
        if self.others:
            notes.append(f"{len(self.others)} other tensors ignored ({_listed(self.others)})")
        return tuple(notes)


def _state_dicts(content: Mapping[object, object], key: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield all mappings with named tensors, with their dotted key; averaged weights first."""
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield key, tensors
    names = [name for name, value in content.items() if isinstance(name, str) and isinstance(value, Mapping)]
    for name in sorted(names, key=lambda each: (each not in EMA_KEYS, each not in PLAIN_KEYS)):
        if depth < _DEEPEST and not name.lower().startswith(_OF_TRAINING):
            inner = cast(Mapping[object, object], content[name])
            yield from _state_dicts(inner, f"{key}.{name}" if key else name, depth + 1)


def _chosen(key: str, tensors: State, wanted: State, *, several: bool) -> _Choice:
    """Find the prefix under which most of the wanted names are."""
    cleaned = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    counts: Counter[str] = Counter()
    for name in cleaned:
        parts = name.split(".")
        for place in range(len(parts)):
            if ".".join(parts[place:]) in wanted:
                counts["".join(f"{part}." for part in parts[:place])] += 1

    def rank(prefix: str) -> tuple[int, bool, int]:
        return counts[prefix], bool(set(prefix.split(".")) & set(EMA_KEYS)), -len(prefix)

    prefix = max(counts, key=rank, default="")
    inside = {name.removeprefix(prefix): tensor for name, tensor in cleaned.items() if name.startswith(prefix)}
    others = tuple(name for name in cleaned if not name.startswith(prefix) and not name.endswith(_WITHOUT_EFFECT))
    return _Choice(key, inside, prefix, counts[prefix], others, several)


def _checked(choice: _Choice, target: Target) -> Match:
    """Compare names and shapes; `fault` describes the first difference."""
    wanted, found = target.state, dict(choice.tensors)
    notes = list(choice.notes)
    extra = [name for name in found if name not in wanted]
    tolerated = [name for name in extra if name.endswith(_WITHOUT_EFFECT)]
    missing = [name for name in wanted if name not in found]
    computed = [name for name in missing if name in target.buffers and not name.endswith(_STATISTICS)]
    counted = [name for name in computed if not name.endswith("num_batches_tracked")]
    if counted:
        notes.append(f"{len(counted)} buffers that the file does not hold are computed ({_listed(counted)})")
    lacking = [name for name in missing if name not in computed]
    heads = [name for name in wanted if name in target.heads]
    no_head = bool(heads) and all(name in lacking for name in heads)
    match = Match({}, target.num_classes, tuple(notes))
    if no_head and len(lacking) == len(heads):
        match, lacking = replace(match, classes=0), []
    if lacking:
        return replace(match, fault=f"{lacking[0]!r} is missing from the file{_and_others(len(lacking))}")
    unknown = [name for name in extra if name not in tolerated]
    if unknown and not (no_head and all(_is_head_like(name, target) for name in unknown)):
        return replace(match, fault=f"the file's {unknown[0]!r} is not a weight of it{_and_others(len(unknown))}")
    state: dict[str, Tensor] = {}
    for name in wanted:
        if name not in found:
            continue
        tensor, expected = found[name], wanted[name]
        if _squeezed(tensor) == _squeezed(expected) and tensor.shape != expected.shape:
            tensor = tensor.reshape(expected.shape)
        if tensor.shape == expected.shape:
            state[name] = tensor
        elif name in target.heads and tensor.dim() == expected.dim() and tensor.shape[1:] == expected.shape[1:]:
            match = replace(match, classes=len(tensor))
        else:
            return replace(
                match, fault=f"{name!r} has shape {tuple(tensor.shape)} in the file, here {tuple(expected.shape)}"
            )
    if match.classes != target.num_classes:
        state = {name: tensor for name, tensor in state.items() if name not in target.heads}
    return replace(match, state=state)


def _is_head_like(name: str, target: Target) -> bool:
    """Whether a name begins like the classifier's, as a projection that replaces it does."""
    return name.partition(".")[0] in {head.partition(".")[0] for head in target.heads}


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    return tuple(side for side in tensor.shape if side != 1)


def _converted_by_timm(choice: _Choice, target: Target) -> Match | None:
    """Apply timm's conversion of other projects' names and of position embeddings; None if it has none."""
    module = sys.modules[type(target.body).__module__]
    convert: Callable[[dict[str, Tensor], nn.Module], Mapping[str, object]] | None
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not module.__name__.startswith("timm."):
        return None
    try:
        with torch.no_grad():
            content = convert(dict(choice.tensors), target.body)
    except Exception:  # noqa: BLE001  timm's functions raise any exception for names that they do not expect
        return None
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    match = _checked(replace(choice, tensors=tensors), target)
    resized = [
        name
        for name, tensor in tensors.items()
        if name in choice.tensors and tensor.shape != choice.tensors[name].shape
    ]
    renamed = len([name for name in tensors if name not in choice.tensors])
    done = [f"{_listed(resized)} resized"] if resized else []
    done += [f"{renamed} names converted"] if renamed else []
    return replace(match, notes=(*match.notes, f"by timm: {' and '.join(done) or 'converted'}"))


def _converted_segformer(choice: _Choice, target: Target) -> Match:
    """Convert the names of mmsegmentation, or of SegFormer's authors."""
    match = _checked(replace(choice, tensors=converted_segformer(choice.tensors)), target)
    of_openmmlab, is_built = has_stage_norm(choice.tensors), any(".fusion." in name for name in target.state)
    if match.fault is not None and of_openmmlab != is_built:
        advice = "set" if of_openmmlab else "leave out"
        return replace(
            match,
            fault=f"its decoder is {'' if of_openmmlab else 'not '}mmsegmentation's: {advice} "
            f"options.{STAGE_NORM}{': true' if of_openmmlab else ''}",
        )
    whose = "mmsegmentation" if of_openmmlab else "SegFormer's program"
    return replace(match, notes=(*match.notes, f"names of {whose} converted"))


def _by_order(choice: _Choice, target: Target) -> Match | None:
    """Match tensors by order, shape and the last part of the name; None if any differs."""
    wanted = {
        name: tensor
        for name, tensor in target.state.items()
        if name not in target.buffers or name.endswith(_STATISTICS)
    }
    found = {name: tensor for name, tensor in choice.tensors.items() if not name.endswith(_WITHOUT_EFFECT)}
    if len(found) != len(wanted):
        return None
    for (name, tensor), (other, expected) in zip(found.items(), wanted.items(), strict=True):
        if name.rpartition(".")[2] != other.rpartition(".")[2]:
            return None
        first = int(other in target.heads)  # the number of classes may differ
        if tensor.dim() != expected.dim() or tensor.shape[first:] != expected.shape[first:]:
            return None
    renamed = dict(zip(wanted, found.values(), strict=True))
    match = _checked(replace(choice, tensors=renamed), target)
    pair = next((f"{old} -> {new}" for old, new in zip(found, wanted, strict=True) if old != new), "")
    note = f"{len(found)} tensors of other names matched by order and shape ({pair}, ...)"
    return None if match.fault is not None else replace(match, notes=(*match.notes, note), by_order=True)


def _listed(names: Collection[str]) -> str:
    first = list(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")


def _and_others(count: int) -> str:
    return f" ({count - 1} more)" if count > 1 else ""
