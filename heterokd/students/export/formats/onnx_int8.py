"""student_int8.onnx: the ONNX graph with weights and activations of 8 bits, for CPUs and edge runtimes.

Static quantization of ONNX Runtime, https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html:
signed 8 bits, a scale for each channel of the weights, ranges of activations from training images. Convolutions and
matrix products are quantized, and the rest stays in 32 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from heterokd.students.export.format import INPUT, ExportFormat, Opened, ToWrite
from heterokd.students.export.formats.onnx import ONNX, open_graph

QUANTIZED = ("Conv", "Gemm", "MatMul")


class ONNXInt8(ExportFormat):
    """ONNX in 8 bits, calibrated on training images: smaller, often faster, and less exact."""

    files = ("student_int8.onnx",)
    libraries = ONNX.libraries
    runtime = ONNX.runtime
    is_exact = False
    calibration_images: ClassVar[int] = 256

    def write(self, student: ToWrite, folder: Path) -> None:
        """Write the graph in 32 bits to a temporary folder, and quantize it."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        assert student.calibration is not None  # of `calibration_images`
        images = student.calibration.numpy()

        class Images(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left: Iterator[NDArray[np.float32]] = iter(np.array_split(images, -(-len(images) // 16)))

            def get_next(self) -> dict[str, NDArray[np.float32]] | None:
                batch = next(self.left, None)
                return None if batch is None else {INPUT: np.ascontiguousarray(batch)}

        with TemporaryDirectory(prefix="heterokd-int8-") as place:
            ONNX().write(student, Path(place))
            graph, prepared = Path(place) / ONNX.files[0], Path(place) / "prepared.onnx"
            quant_pre_process(graph, prepared, skip_symbolic_shape=True)
            logging.disable(logging.WARNING)  # the root logger's, about the step before
            try:
                quantize_static(
                    prepared,
                    folder / self.files[0],
                    Images(),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    op_types_to_quantize=list(QUANTIZED),
                )
            finally:
                logging.disable(logging.NOTSET)

    def open(self, folder: Path) -> Opened:
        """Open the graph in ONNX Runtime with one thread."""
        return open_graph(folder / self.files[0])
