"""Exceptions of heterokd.

HeterokdError
├── UserError              the input is wrong; the command line exits with 2
│   ├── ConfigError        a wrong key or value in an experiment, search space or override
│   ├── DataError          a missing, damaged or empty data set
│   ├── NetworkError       a network that does not exist or does not give logits
│   ├── CostError          a cost of a student that cannot be measured
│   ├── PairError          a method (or its layout) that does not support this teacher and student
│   ├── CheckpointError    missing or damaged weights, or weights of a different network
│   ├── CacheError         teacher outputs that are missing, damaged, of a different key, or too large
│   ├── StudyError         a missing, unfinished or running study, or a study of another experiment
│   ├── TrackingError      an MLflow store that cannot be used or does not answer
│   └── PromotionError     nothing to promote, or no comparison is possible
├── SearchError            the search was stopped because no trial can run
├── ExportError            an exported file whose outputs differ from the student's
├── MissingSignal          an output was read that was not requested
└── TrainingDiverged       a loss or output that is not finite; the trial is recorded as diverged
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class HeterokdError(Exception):
    """Base class of heterokd's exceptions."""


class UserError(HeterokdError):
    """The input is wrong. The message states what, where (file and key) and what to do."""


class ConfigError(UserError):
    """A key, name or value of an experiment or search space is wrong."""


class DataError(UserError):
    """A data set is missing, damaged, empty or does not fit the experiment."""


class NetworkError(UserError):
    """A network does not exist, cannot be built, or does not give logits for images of this size."""


class CostError(UserError):
    """A cost of a student cannot be measured, such as the latency of a network that cannot be quantized."""


class PairError(UserError):
    """A method, or its layout, does not support this teacher and student."""


class CheckpointError(UserError):
    """Weights are missing, damaged or of a different network."""


class CacheError(UserError):
    """Cached teacher outputs are missing, damaged, of a different key, or too large for the disk."""


class StudyError(UserError):
    """A study is missing, unfinished, already running, or belongs to another experiment."""


class TrackingError(UserError):
    """The MLflow store cannot be used, or does not answer."""


class PromotionError(UserError):
    """There is nothing to promote, or no comparison with the champion is possible."""


class SearchError(HeterokdError):
    """The search was stopped because no trial can run on this machine or cluster; its results are kept."""


class ExportError(HeterokdError):
    """The outputs of an exported file differ from the student's; the file is not kept."""


class MissingSignal(HeterokdError):
    """An output was read that was not requested; the message names the Signal to add."""


class TrainingDiverged(HeterokdError):
    """A loss or an output is not finite; the message names the term, the epoch and the step."""


def without_password(text: str) -> str:
    """Remove user names and passwords from the URLs in a text.

    >>> without_password("http://me:secret@host:5000 does not answer")
    'http://***@host:5000 does not answer'
    """
    return re.sub(r"://[^/\s]+@", "://***@", text)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Suggest the closest known name, or list all names if they are few.

    >>> did_you_mean("hdc", ["kd", "hcd"])
    "did you mean 'hcd'?"
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    if len(known) <= 12:
        return "known: " + ", ".join(known)
    return f"none of the {len(known)} known names is similar"
