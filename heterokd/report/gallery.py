"""The images of val that a study's winner gets wrong with the most confidence, as the page shows them."""

from __future__ import annotations

import base64

from heterokd.report.study_data import StudyReport
from heterokd.report.tables import Row


def failure_gallery(report: StudyReport) -> list[Row]:
    """List the wrong images with the most confidence, as base64 text; those whose file is missing are left out."""
    measured, rows = report.measured, list[Row]()
    if measured is None:
        return rows
    for failure in measured.failures:
        file = report.folder.pictures / failure.file
        if not file.is_file() or max(failure.label, failure.predicted) >= len(measured.classes):
            continue
        rows.append(
            {
                "data": base64.b64encode(file.read_bytes()).decode("ascii"),
                "type": "png" if file.suffix == ".png" else "jpeg",
                "index": failure.index,
                "label": measured.classes[failure.label],
                "predicted": measured.classes[failure.predicted],
                "confidence": f"{failure.confidence:.2f}",
                "label_probability": f"{failure.label_probability:.2f}",
            }
        )
    return rows
