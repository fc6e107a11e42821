"""A trained student as files that run without heterokd: ONNX, torch.export, or safetensors that timm opens.

    with find_student(root, "models:/digits-student@champion") as student:
        exported = export_student(student, "onnx", Path("deploy"))

Nothing is kept that was not checked: what was written is opened again from its file, and its logits for real images of
the study's val split, one and five at a time, are compared with those of the trained student.

`sources` finds the student, `formats` writes and opens files, `checking` compares, `exporting` does it all.
"""

from heterokd.export.checking import PARITY, Parity, compare_with_student, parity_images
from heterokd.export.exporting import Exported, export_student, try_export
from heterokd.export.formats import FORMATS, FormatName, open_exported
from heterokd.export.sources import Student, find_student

__all__ = [
    "FORMATS",
    "PARITY",
    "Exported",
    "FormatName",
    "Parity",
    "Student",
    "compare_with_student",
    "export_student",
    "find_student",
    "open_exported",
    "parity_images",
    "try_export",
]
