"""The three kinds of file: how each is written, and how it is opened again. The only import of ONNX.

onnx          student.onnx       images [B, 3, H, W] in [0, 1] to logits; normalisation is inside
pt2           student.pt2        the same as a graph of torch.export
safetensors   model.safetensors  the weights alone, and config.json: for timm, or for `open_exported`
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from heterokd.errors import CheckpointError, NetworkError
from heterokd.networks.network import AnyNetwork, build_network, deployable
from heterokd.networks.segmentation import SegmentationNetwork
from heterokd.networks.timm_folder import open_timm_folder, timm_config
from heterokd.networks.weights import load_weights, save_weights
from heterokd.storage.files import read_json, write_text
from heterokd.training.task_modules import upsample

FormatName = Literal["onnx", "pt2", "safetensors"]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
INPUT, OUTPUT = "images", "logits"
AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True, eq=False)
class Written:
    """Files of a student, opened again.

    Attributes:
        files: names in their folder, the one that holds the weights first.
        run: images [B, 3, H, W] in [0, 1] to logits, by the file.
        size: height and width of the only images that `run` takes; None: any.
        runtime: what runs it.
        versions: of the libraries that wrote and run it.
        normalised_inside: whether mean and deviation are part of the file.
        opened_with: how a user opens it.
    """

    files: tuple[str, ...]
    run: Callable[[Tensor], Tensor]
    size: tuple[int, int] | None
    runtime: str
    versions: Mapping[str, str]
    normalised_inside: bool
    opened_with: str


def write_onnx(
    network: AnyNetwork, view: tuple[int, int], card: Mapping[str, Any], folder: Path, one_size: bool = False
) -> Written:
    """student.onnx, by torch's exporter; ONNX Runtime runs it.

    Args:
        network: in evaluation mode.
        view: height and width of the images that it was trained on.
        card: what is known of it; kept in the file as text.
        folder: must exist.
        one_size: write a graph for images of `view` alone, also where the network takes any.

    Raises:
        NetworkError: the exporter cannot write this network down.
    """
    import onnx
    import onnxruntime

    file, module = folder / "student.onnx", deployable(network)

    def write(size: tuple[int, int] | None) -> None:
        axes = {axis: name for axis, name in AXES.items() if axis == 0 or size is None}
        program = torch.onnx.export(
            module,
            (_example(size or view),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=[axes],
            dynamo=True,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch's exporter gave nothing back")
        program.model.metadata_props.update({key: json.dumps(value) for key, value in card.items()})
        program.save(file, external_data=False)
        onnx.checker.check_model(file, full_check=False)

    with _silent():
        size = _first_that_works("ONNX", network, view, write, one_size)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return Written(
        files=(file.name,),
        run=run,
        size=size,
        runtime="ONNX Runtime, CPU",
        versions=_versions("torch", "onnx", "onnxscript", "onnxruntime"),
        normalised_inside=True,
        opened_with=f'onnxruntime.InferenceSession("{file.name}").run(None, {{"{INPUT}": images}})',
    )


def write_pt2(
    network: AnyNetwork, view: tuple[int, int], card: Mapping[str, Any], folder: Path, one_size: bool = False
) -> Written:
    """student.pt2, by torch.export; torch alone runs it. Arguments and errors are those of `write_onnx`."""
    file, module = folder / "student.pt2", deployable(network)

    def write(size: tuple[int, int] | None) -> None:
        axes = {axis: torch.export.Dim.AUTO for axis in AXES if axis == 0 or size is None}
        program = torch.export.export(module, (_example(size or view),), dynamic_shapes=[axes])
        torch.export.save(program, file, extra_files={"student.json": json.dumps(dict(card))})

    with _silent():
        size = _first_that_works("torch.export", network, view, write, one_size)
        graph = torch.export.load(file).module()

    def run(images: Tensor) -> Tensor:
        logits: Tensor = graph(images)
        return logits

    return Written(
        files=(file.name,),
        run=run,
        size=size,
        runtime="torch, CPU",
        versions=_versions("torch"),
        normalised_inside=True,
        opened_with=f'torch.export.load("{file.name}").module()(images)',
    )


def write_safetensors(
    network: AnyNetwork, view: tuple[int, int], card: Mapping[str, Any], folder: Path, one_size: bool = False
) -> Written:
    """model.safetensors and config.json. timm opens them where it can build the network, else `open_exported`.

    Arguments are those of `write_onnx`.
    """
    save_weights(network, folder / WEIGHTS)
    config = timm_config(network, card["class_names"])
    body, opened_with = None, "heterokd.export.open_exported(FOLDER)"
    if config is not None:
        write_text(folder / CONFIG, json.dumps({**config, "heterokd": dict(card)}, indent=1))
        # Mixer and ResMLP refuse their own options in timm, so it is tried, not assumed.
        with contextlib.suppress(Exception):
            body = open_timm_folder(folder)
    if body is None:
        write_text(folder / CONFIG, json.dumps({"heterokd": dict(card)}, indent=1))
    else:
        opened_with = 'timm.create_model("local-dir:FOLDER", pretrained=True)'
    reopened = open_exported(folder)

    def run(images: Tensor) -> Tensor:
        if body is not None:
            logits: Tensor = body((images - reopened.mean) / reopened.std)
            return logits
        given: Tensor = reopened(images).logits
        return upsample(given, images.shape[-2:]) if given.dim() == 4 else given

    size = None if isinstance(network, SegmentationNetwork) else (network.spec.image_size,) * 2
    return Written(
        files=(WEIGHTS, CONFIG),
        run=run,
        size=size,
        runtime="torch, CPU",
        versions=_versions("torch", "timm", "safetensors"),
        normalised_inside=body is None,
        opened_with=opened_with,
    )


Write = Callable[[AnyNetwork, tuple[int, int], Mapping[str, Any], Path, bool], Written]
FORMATS: Mapping[FormatName, Write] = {
    "onnx": write_onnx,
    "pt2": write_pt2,
    "safetensors": write_safetensors,
}


def open_exported(folder: str | Path) -> AnyNetwork:
    """The student of a folder that `heterokd export --format safetensors` wrote, in evaluation mode on the CPU.

    It takes RGB images [B, 3, H, W] in [0, 1] and gives `Outputs`: `open_exported(folder)(images).logits`.

    Raises:
        CheckpointError: files are missing, damaged, or not those of such an export.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG).get("heterokd")
    if not isinstance(config, dict) or not {"network", "options", "num_classes", "image_size"} <= set(config):
        raise CheckpointError(f"{folder / CONFIG}: is missing or not that of an exported student; export it again")
    network = build_network(
        config["network"],
        config["num_classes"],
        config["options"],
        image_size=config["image_size"],
        mean=config.get("mean"),
        std=config.get("std"),
    )
    load_weights(network, folder / WEIGHTS)
    return network.eval()


def _first_that_works(
    exporter: str,
    network: AnyNetwork,
    view: tuple[int, int],
    write: Callable[[tuple[int, int] | None], None],
    one_size: bool,
) -> tuple[int, int] | None:
    """The size of images that was written: any (None) where the network takes any, or one."""
    own = network.spec.image_size
    sizes: list[tuple[int, int] | None] = [(own, own)]
    if isinstance(network, SegmentationNetwork):
        # A map of one pixel is another graph, see `tracking.students.graph_size`.
        sizes = [None, view] if network.any_size and min(view) > network.multiple and not one_size else [view]
    failed: Exception | None = None
    for size in sizes:
        try:
            write(size)
        except OSError:
            raise  # a full disk is not the network's fault
        except Exception as error:  # noqa: BLE001 - exporters raise whatever they trip over
            failed = error
        else:
            return size
    said = (str(failed).strip().splitlines() or [type(failed).__name__])[0][:200].rstrip(".")
    raise NetworkError(
        f"network {network.name!r}: {exporter} cannot write it down ({said}); "
        "export it with --format safetensors, which always works, or choose another student"
    ) from failed


def _example(size: tuple[int, int]) -> Tensor:
    """Two images: an exporter makes a constant of a batch of one."""
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def _versions(*libraries: str) -> dict[str, str]:
    return {name: version(name) for name in libraries}


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporters' remarks off the terminal; what they raise comes through."""
    loggers = [
        logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.onnx", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
