"""Read files of weights without executing anything: safetensors, and files of torch.save (`.pt`, `.pth.tar`, `.ckpt`).

The format is found by content, not by suffix. A pickle is opened by `torch.load(weights_only=True)`, which calls only
PyTorch's functions for tensors; objects of other classes, such as `argparse.Namespace` in timm's checkpoints, are
replaced by `Placeholder`. Files that hold code or other content are refused by name.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch.serialization import safe_globals

from heterokd.errors import CheckpointError

HEAD_BYTES = 512
LARGEST_HEADER = 100_000_000
"""Maximum size of a safetensors header, in bytes; a limit of the format."""

_BEGINNINGS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "are a git-lfs pointer, not the weights; fetch them with `git lfs pull`"),
    (0, b"\x89HDF", "are an HDF5 file (Keras), not PyTorch weights; convert them to safetensors"),
    (0, b"\x1f\x8b", "are compressed by gzip; unpack them and give the file inside"),
    (0, b"\xfd7zXZ", "are compressed by xz; unpack them and give the file inside"),
    (0, b"BZh", "are compressed by bzip2; unpack them and give the file inside"),
    (0, b"\x28\xb5\x2f\xfd", "are compressed by zstd; unpack them and give the file inside"),
    (0, b"7z\xbc\xaf", "are a 7z archive; unpack it and give the file inside"),
    (0, b"Rar!", "are a RAR archive; unpack it and give the file inside"),
    (257, b"ustar", "are a tar archive; unpack it and give the file inside"),
    (0, b"GGUF", "are a GGUF file, not PyTorch weights; give safetensors or a state dict"),
    (4, b"TFL3", "are a TensorFlow Lite model, not PyTorch weights; give safetensors or a state dict"),
    (0, b"\x93NUMPY", "are a NumPy array, not a state dict; save them by safetensors or torch.save"),
    (0, b"\x89PNG", "are an image, not weights; give the file of weights"),
)
"""Position, bytes there, and a sentence about the file."""

_RUNS_CODE = {
    *("asyncio", "code", "commands", "ctypes", "httplib", "importlib", "multiprocessing", "nt", "os", "pdb", "pickle"),
    *("posix", "pty", "requests", "runpy", "shutil", "socket", "subprocess", "sys", "urllib", "webbrowser"),
}
"""Modules whose functions no checkpoint needs; a pickle that names them is an attack."""
_RUNS_CODE_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open"}


class Placeholder:
    """An object of a class that is not loaded; it ignores its arguments and its state."""

    def __new__(cls, *_arguments: object) -> Placeholder:
        """Create an object without content."""
        return super().__new__(cls)

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


@dataclass(frozen=True)
class CheckpointFile:
    """The content of a file of weights.

    Attributes:
        content: tensors by name, or nested mappings of them and of other plain values.
        metadata: strings of a safetensors header.
        classes: classes whose objects were replaced by placeholders, in a pickle.
        ordered: whether the order of the tensors is that of the network, as in pickles; safetensors sorts them.
    """

    content: Mapping[object, object]
    metadata: Mapping[str, str]
    classes: tuple[str, ...] = ()
    ordered: bool = False


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """Read a file of weights to the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or holds code.
    """
    if path.is_dir():
        raise CheckpointError(f"weights {path} are a folder; give the file of weights in it")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"weights {path} do not exist") from error
    except OSError as error:
        raise CheckpointError(f"weights {path} cannot be read ({error.strerror or error})") from error
    if not head:
        raise CheckpointError(f"weights {path} are damaged: the file is empty; copy or download it again")
    _refuse_other_formats(path, head)
    if _is_safetensors(path, head):
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        return _read_archive(path)
    if head[:1] == b"\x80" or _is_pickle(path):
        return _read_pickle(path, head)
    raise CheckpointError(
        f"weights {path} are damaged or not a file of weights: neither safetensors nor a file of torch.save"
    )


def _refuse_other_formats(path: Path, head: bytes) -> None:
    for position, expected, sentence in _BEGINNINGS:
        if head[position : position + len(expected)] == expected:
            raise CheckpointError(f"weights {path} {sentence}")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        kind = "an XML message" if text.startswith(b"<?xml") else "a web page (HTML)"
        raise CheckpointError(f"weights {path} are {kind}, not weights; download the file itself")
    if text.startswith((b"{", b"[")):
        raise CheckpointError(
            f"weights {path} are a JSON file, not weights; if it is the index of several files, merge these first"
        )
    if path.suffix == ".onnx":
        raise CheckpointError(f"weights {path} are an ONNX graph; give a state dict or safetensors of the network")


def _is_safetensors(path: Path, head: bytes) -> bool:
    length = struct.unpack("<Q", head[:8])[0] if len(head) > 8 else 0
    return path.suffix == ".safetensors" or (0 < length <= LARGEST_HEADER and head[8:9] == b"{")


def _read_safetensors(path: Path) -> CheckpointFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
            return CheckpointFile(tensors, file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        if zipfile.is_zipfile(path):
            return _read_archive(path)
        raise CheckpointError(f"weights {path} are damaged or not a safetensors file: {error}") from error


def _read_archive(path: Path) -> CheckpointFile:
    """Read a file of torch.save since PyTorch 1.6, a zip archive with the pickle `data.pkl`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            _refuse_other_archives(path, names)
            broken = archive.testzip()  # torch.load does not verify checksums
            if broken is not None:
                raise CheckpointError(f"weights {path} are damaged (wrong checksum of {broken}); copy them again")
            with archive.open(next(name for name in names if name.endswith("data.pkl"))) as pickled:
                named = _globals_of(pickled.read())
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"weights {path} are damaged, perhaps cut ({error}); copy them again") from error
    return _load(path, named)


def _refuse_other_archives(path: Path, names: list[str]) -> None:
    files = [name.partition("/")[2] or name for name in names]
    if any(name == "constants.pkl" or name.startswith("code/") for name in files):
        kind = "a TorchScript archive (torch.jit.save)"
    elif any(name in ("archive_format", "serialized_exported_program.json") for name in (*files, *names)):
        kind = "an exported graph (torch.export.save, pt2)"
    elif any(name.endswith("data.pkl") for name in names):
        return
    elif any(name.endswith(".npy") for name in names):
        raise CheckpointError(f"weights {path} are NumPy arrays (npz), not a state dict; save them by safetensors")
    else:
        raise CheckpointError(f"weights {path} are a zip archive of other files; unpack it and give the weights")
    raise CheckpointError(f"weights {path} are {kind}, which holds code; {_SAVE_ALONE}")


def _read_pickle(path: Path, head: bytes) -> CheckpointFile:
    """Read a file of torch.save before PyTorch 1.6: a sequence of pickles, then the storages."""
    named = _names(path)
    if head.startswith(_LEGACY_BEGINNING):
        return _load(path, named)
    _refuse_attack(path, named)
    raise CheckpointError(
        f"weights {path} are a plain pickle, not a file of torch.save; save them by safetensors or torch.save"
    )


_LEGACY_BEGINNING = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickle of PyTorch's magic number."""
_LEGACY_PICKLES = 4
"""Magic number, protocol, system, and the object itself."""


def _names(path: Path) -> Collection[str]:
    """Return the globals of the first pickles of a file."""
    named: dict[str, None] = {}
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            try:
                named |= _globals_of(file)
            except (ValueError, EOFError):
                break
    return named


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle of the protocols 0 and 1, which have no magic bytes."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 1
    except ValueError:
        return False


def _globals_of(pickled: bytes | BinaryIO) -> dict[str, None]:
    """Return the dotted names of a pickle's classes and functions, in their order, without unpickling it."""
    named: dict[str, None] = {}
    strings = [""]
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            named[str(argument).replace(" ", ".")] = None
        elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
            named[f"{strings[-2]}.{strings[-1]}"] = None
        elif isinstance(argument, str):
            strings.append(argument)
    return named


def _refuse_attack(path: Path, named: Collection[str]) -> None:
    for name in named:
        module, _, function = name.rpartition(".")
        root = module.partition(".")[0]
        if root in _RUNS_CODE or (root in ("builtins", "__builtin__") and function in _RUNS_CODE_BUILTINS):
            raise CheckpointError(
                f"weights {path} are refused: opening the pickle would call {name}, as an attack does; nothing "
                "was executed; get the weights from another source, as safetensors"
            )


def _load(path: Path, named: Collection[str]) -> CheckpointFile:
    _refuse_attack(path, named)
    try:
        try:
            content = _unpickled(path, named, Placeholder)
        except pickle.UnpicklingError as error:
            if "Can only SETITEM" not in str(error):
                raise
            # A subclass of dict, as of settings: PyTorch fills an OrderedDict in its place.
            content = _unpickled(path, named, OrderedDict)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        _refuse_network(path, named)
        found = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
        reason = found[1].strip() if found else str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"weights {path} are damaged, or cannot be opened without executing code ({reason}); {_SAVE_ALONE}"
        ) from error
    foreign = [name for name in named if not name.startswith(_HARMLESS)]
    if isinstance(content, Mapping) and next(_tensors(content), None) is not None:
        return CheckpointFile(content, {}, tuple(foreign), ordered=True)
    _refuse_network(path, named)
    kind = foreign[0] if isinstance(content, Placeholder) and foreign else type(content).__name__
    raise CheckpointError(f"weights {path} hold no state dict (found: {kind}); {_SAVE_ALONE}")


def _unpickled(path: Path, named: Collection[str], replacement: Callable[..., object]) -> object:
    """Load a file of torch.save with another class in place of those that PyTorch does not allow."""
    allowed: list[Callable[..., object] | tuple[Callable[..., object], str]]
    allowed = [(replacement, name) for name in named]
    # From an open file: torch.load decides by the suffix otherwise.
    with path.open("rb") as file, safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content: object = torch.load(file, map_location="cpu", weights_only=True)
    return content


def _refuse_network(path: Path, named: Collection[str]) -> None:
    """Refuse a pickled network by the name of its class, the first in the pickle."""
    if any(name.startswith("torch.nn.modules.") for name in named):
        kind = next((name for name in named if not name.startswith(_HARMLESS)), next(iter(named)))
        raise CheckpointError(
            f"weights {path} are a whole pickled network ({kind}), which needs its code; {_SAVE_ALONE}"
        )


_SAVE_ALONE = "save the weights alone: torch.save(network.state_dict(), FILE)"
_HARMLESS = ("torch.", "collections.", "numpy.", "_codecs.", "builtins.", "__builtin__.")


def _tensors(content: Mapping[object, object]) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested mappings."""
    for value in content.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value)
