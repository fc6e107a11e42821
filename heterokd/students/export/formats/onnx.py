"""student.onnx, written by torch's exporter and run by ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

from heterokd.networks.network import deployable
from heterokd.networks.onnx_graph import INPUT, open_graph, write_graph
from heterokd.students.export.format import ExportFormat, Opened, ToWrite


class ONNX(ExportFormat):
    """ONNX: a graph with its weights, for many runtimes."""

    files = ("student.onnx",)
    libraries = ("torch", "onnx", "onnxscript", "onnxruntime")
    runtime = "ONNX Runtime, CPU"

    def write(self, student: ToWrite, folder: Path) -> None:
        """Write the graph, with the card as its metadata."""
        metadata = {key: json.dumps(value) for key, value in student.card.items()}
        file = folder / self.files[0]
        write_graph(deployable(student.network), student.example, file, student.open_axes, metadata)

    def open(self, folder: Path) -> Opened:
        """Open the graph in ONNX Runtime with one thread."""
        return opened(folder / self.files[0])


def opened(file: Path) -> Opened:
    """Open a graph in ONNX Runtime with one thread."""
    return Opened(open_graph(file), f'onnxruntime.InferenceSession("{file.name}").run(None, {{"{INPUT}": images}})')
