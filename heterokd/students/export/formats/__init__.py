"""Export formats, a file each; installed packages add formats by entry points `heterokd.exports`.

onnx          student.onnx       images [B, 3, H, W] in [0, 1] to logits, normalisation included
pt2           student.pt2        the same as a graph of torch.export
safetensors   model.safetensors  the weights alone, and config.json: for timm, or for `heterokd.load_student`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from heterokd.errors import ConfigError, did_you_mean
from heterokd.extensions import Implementations

if TYPE_CHECKING:
    from heterokd.students.export.format import ExportFormat

FORMATS: Implementations[ExportFormat] = Implementations(
    __name__, "heterokd.students.export.format:ExportFormat", "heterokd.exports"
)


def format_named(name: str, formats: Mapping[str, type[ExportFormat]] = FORMATS) -> type[ExportFormat]:
    """Return the format of a name.

    Raises:
        ConfigError: there is no format of that name.
    """
    if name not in formats:
        raise ConfigError(f"--format {name}: there is no such format; {did_you_mean(name, formats)}")
    return formats[name]
