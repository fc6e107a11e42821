"""ONNX graphs of networks: write, quantize to 8 bits, open in ONNX Runtime, and time.

Quantization is ONNX Runtime's static one,
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html: signed 8 bits, a scale for each channel
of the weights, ranges of activations from calibration images. Convolutions and matrix products are quantized, and the
rest stays in 32 bits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heterokd.errors import CostError
from heterokd.networks.silence import export_reason, silenced_exporters
from heterokd.networks.student_cost import Runtime
from heterokd.networks.timing import time_call

INPUT, OUTPUT = "images", "logits"
"""Names of the input and the output of an exported graph."""
AXES = {0: "batch", 2: "height", 3: "width"}
"""Dynamic axes of the images, by number."""
QUANTIZED = ("Conv", "Gemm", "MatMul")
CUDA = "CUDAExecutionProvider"
CALIBRATION_BATCH = 16


def write_graph(
    network: nn.Module, example: Tensor, file: Path, open_axes: Sequence[int] = (0,), metadata: Mapping[str, str] = {}
) -> None:
    """Write a network as an ONNX graph, with torch's exporter.

    Args:
        network: images [B, 3, H, W] to logits, in evaluation mode, on the CPU.
        example: images [2, 3, H, W] to trace it with; two, because a batch of one becomes a constant.
        file: file to write.
        open_axes: numbers of the dynamic axes, of `AXES`.
        metadata: texts to store in the file.

    Raises:
        Exception: of many kinds; the graph cannot be exported.
    """
    import onnx

    program = torch.onnx.export(
        network,
        (example,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=[{axis: AXES[axis] for axis in open_axes}],
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch's exporter returned no program")
    program.model.metadata_props.update(metadata)
    program.save(file, external_data=False)
    onnx.checker.check_model(file, full_check=False)


def quantize_graph(graph: Path, calibration: Tensor, file: Path) -> None:
    """Write a graph with weights and activations of 8 bits.

    Args:
        graph: the graph in 32 bits.
        calibration: images [N, 3, H, W] in [0, 1] that the ranges of activations are measured on.
        file: file to write.

    Raises:
        Exception: of many kinds; the graph cannot be quantized.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = calibration.numpy()

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            batches = np.array_split(images, -(-len(images) // CALIBRATION_BATCH))
            self.left: Iterator[NDArray[np.float32]] = iter(batches)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self.left, None)
            return None if batch is None else {INPUT: np.ascontiguousarray(batch)}

    with TemporaryDirectory(prefix="heterokd-int8-") as place:
        prepared = Path(place) / "prepared.onnx"
        quant_pre_process(graph, prepared, skip_symbolic_shape=True)
        logging.disable(logging.WARNING)  # the root logger's, about the step before
        try:
            quantize_static(
                prepared,
                file,
                Images(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=list(QUANTIZED),
            )
        finally:
            logging.disable(logging.NOTSET)


def runtime_fault(runtime: Runtime) -> tuple[str, str] | None:
    """Return what this machine lacks for a runtime: the attribute and the reason; None if it lacks nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if runtime.device == "cpu":
        fits = runtime.threads <= cores
        return None if fits else ("threads", f"is {runtime.threads}, but this machine has {cores} cores")
    if runtime.name == "torch":
        return None if torch.cuda.is_available() else ("device", "is cuda, but torch finds no GPU on this machine")
    import onnxruntime

    has_provider = CUDA in onnxruntime.get_available_providers()
    return None if has_provider else ("device", f"is cuda, but ONNX Runtime has no {CUDA} on this machine")


def open_graph(file: Path, runtime: Runtime = Runtime("onnx")) -> Callable[[Tensor], Tensor]:  # noqa: B008  frozen
    """Open a graph in ONNX Runtime, and return it as a function from images [B, 3, H, W] on the CPU to logits.

    Raises:
        CostError: ONNX Runtime cannot use the device.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = runtime.threads, 1
    options.log_severity_level = 3
    provider = CUDA if runtime.device == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(file, options, providers=[provider])
    if provider not in session.get_providers():  # it falls back to the CPU, with a log entry
        raise CostError(f"ONNX Runtime cannot use {provider} on this machine")

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


def time_graph(network: nn.Module, size: tuple[int, int], runtime: Runtime, *, int8: bool = False) -> float:
    """Return the median time in milliseconds of a network's graph for one image, in ONNX Runtime.

    Args:
        network: images [B, 3, H, W] in [0, 1] to logits, in evaluation mode, on the CPU.
        size: height and width of an image, in pixels.
        runtime: threads and device.
        int8: whether the graph is quantized; the ranges of random images serve, since they do not change the time.

    Raises:
        CostError: the network cannot be exported or quantized.
    """
    images = torch.rand(CALIBRATION_BATCH, 3, *size, generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory(prefix="heterokd-onnx-") as folder, silenced_exporters():
        file = Path(folder) / "student.onnx"
        try:
            write_graph(network, images[:2], file)
            if int8:
                graph, file = file, Path(folder) / "student_int8.onnx"
                quantize_graph(graph, images, file)
            run = open_graph(file, runtime)
        except (OSError, CostError):
            raise  # a full disk or a missing GPU: not a limitation of the network
        except Exception as error:
            goal = "quantized to 8 bits" if int8 else "written"
            raise CostError(f"it cannot be {goal} as ONNX ({export_reason(error)})") from error
        return time_call(partial(run, images[:1]), runtime.threads).median_ms
