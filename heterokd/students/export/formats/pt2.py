"""student.pt2, a graph of torch.export, run by torch."""

from __future__ import annotations

from pathlib import Path

import torch

from heterokd.networks.network import deployable
from heterokd.students.export.format import ExportFormat, Opened, ToWrite


class PT2(ExportFormat):
    """torch.export: a graph with its weights, for torch and AOTInductor."""

    files = ("student.pt2",)
    libraries = ("torch",)

    def write(self, student: ToWrite, folder: Path) -> None:
        """Write the graph, with the card as student.json in the archive."""
        axes = dict.fromkeys(student.open_axes, torch.export.Dim.AUTO)
        program = torch.export.export(deployable(student.network), (student.example,), dynamic_shapes=[axes])
        torch.export.save(program, folder / self.files[0], extra_files={"student.json": student.card_text})

    def open(self, folder: Path) -> Opened:
        """Load the graph."""
        file = folder / self.files[0]
        return Opened(torch.export.load(file).module(), f'torch.export.load("{file.name}").module()(images)')
