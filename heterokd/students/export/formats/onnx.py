"""student.onnx, written by torch's exporter and run by ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from heterokd.networks.network import deployable
from heterokd.students.export.format import AXES, INPUT, OUTPUT, ExportFormat, Opened, ToWrite


class ONNX(ExportFormat):
    """ONNX: a graph with its weights, for many runtimes."""

    files = ("student.onnx",)
    libraries = ("torch", "onnx", "onnxscript", "onnxruntime")
    runtime = "ONNX Runtime, CPU"

    def write(self, student: ToWrite, folder: Path) -> None:
        """Write the graph, with the card as its metadata."""
        import onnx

        program = torch.onnx.export(
            deployable(student.network),
            (student.example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=[{axis: AXES[axis] for axis in student.open_axes}],
            dynamo=True,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch's exporter returned no program")
        program.model.metadata_props.update({key: json.dumps(value) for key, value in student.card.items()})
        file = folder / self.files[0]
        program.save(file, external_data=False)
        onnx.checker.check_model(file, full_check=False)

    def open(self, folder: Path) -> Opened:
        """Open the graph in ONNX Runtime with one thread."""
        return open_graph(folder / self.files[0])


def open_graph(file: Path) -> Opened:
    """Open a graph in ONNX Runtime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return Opened(run, f'onnxruntime.InferenceSession("{file.name}").run(None, {{"{INPUT}": images}})')
