"""student_int8.onnx: the ONNX graph with weights and activations of 8 bits, for CPUs and edge runtimes.

See `heterokd.networks.onnx_graph` for what is quantized.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from heterokd.networks.onnx_graph import quantize_graph
from heterokd.students.export.format import ExportFormat, Opened, ToWrite
from heterokd.students.export.formats.onnx import ONNX, opened


class ONNXInt8(ExportFormat):
    """ONNX in 8 bits, calibrated on training images: smaller, often faster, and less exact."""

    files = ("student_int8.onnx",)
    libraries = ONNX.libraries
    runtime = ONNX.runtime
    is_exact = False
    calibration_images: ClassVar[int] = 256

    def write(self, student: ToWrite, folder: Path) -> None:
        """Write the graph in 32 bits to a temporary folder, and quantize it."""
        assert student.calibration is not None  # of `calibration_images`
        with TemporaryDirectory(prefix="heterokd-int8-") as place:
            ONNX().write(student, Path(place))
            quantize_graph(Path(place) / ONNX.files[0], student.calibration, folder / self.files[0])

    def open(self, folder: Path) -> Opened:
        """Open the graph in ONNX Runtime with one thread."""
        return opened(folder / self.files[0])
