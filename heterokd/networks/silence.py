"""Suppress what exporters print, and find the reason in what they raise."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

EXPORTERS = ("torch.export", "torch._export", "torch.onnx", "onnxscript", "onnx_ir")
"""Names of the exporters' loggers."""


@contextmanager
def silenced_exporters() -> Iterator[None]:
    """Suppress the log, warnings and output of exporters; their exceptions are raised."""
    loggers = [logging.getLogger(name) for name in EXPORTERS]
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


def export_reason(error: BaseException) -> str:
    """Return the first line of the first cause of an exporter's exception, without colours, shortened."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200].rstrip(".")
