"""Everything heterokd raises on purpose.

HeterokdError
├── UserError              the input is wrong; the command line exits with 2
│   ├── ConfigError        an experiment, search space or override: names file and key
│   ├── DataError          a data set that is missing, damaged or empty
│   ├── NetworkError       a network that does not exist or cannot be split into stages
│   ├── PairError          a method (or its layout) that cannot exist for this teacher and student
│   ├── CheckpointError    weights that are missing, damaged or of another network
│   ├── CacheError         stored teacher outputs that are missing, damaged, of something else, or do not fit the disk
│   ├── StudyError         a study that is missing, unfinished, running or of another experiment
│   ├── TrackingError      the MLflow store cannot be used or does not answer
│   └── PromotionError     nothing to promote, or nothing to compare it with
├── SearchError            no trial can run here, so the search has stopped
├── ExportError            a file that was written does not do what the student does
├── MissingSignal          a method read an output that it did not declare
└── TrainingDiverged       a loss that is not finite; the trial is recorded as failed
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class HeterokdError(Exception):
    """Root of the tree: catching it catches everything heterokd raises on purpose."""


class UserError(HeterokdError):
    """The input is wrong. One sentence: what, where (file and key), what to do."""


class ConfigError(UserError):
    """A key, name or value of an experiment or search space is wrong."""


class DataError(UserError):
    """A data set is missing, damaged, empty or of another shape than its experiment says."""


class NetworkError(UserError):
    """A network does not exist, or its structure cannot be split into four stages."""


class PairError(UserError):
    """A method, or one of its layouts, cannot exist for this teacher and student."""


class CheckpointError(UserError):
    """Weights are missing, damaged or belong to another network."""


class CacheError(UserError):
    """Stored teacher outputs are missing, damaged, belong to something else, or do not fit on the disk."""


class StudyError(UserError):
    """A study is missing, unfinished, already running, or belongs to another experiment."""


class TrackingError(UserError):
    """The MLflow store cannot be used, or does not answer."""


class PromotionError(UserError):
    """There is nothing to promote, or it cannot be compared with the champion."""


class SearchError(HeterokdError):
    """No trial can run on this machine or cluster, so the search has stopped; what was computed is kept."""


class ExportError(HeterokdError):
    """A file that was written does not do what the trained student does; it is not kept."""


class MissingSignal(HeterokdError):
    """An output was read that was not asked for; the sentence names the Signal to add."""


class TrainingDiverged(HeterokdError):
    """A loss or an output is not finite; the sentence names the term, the epoch and the step."""


def without_password(text: str) -> str:
    """A text whose addresses name nobody and hold no password.

    >>> without_password("http://me:secret@host:5000 does not answer")
    'http://***@host:5000 does not answer'
    """
    return re.sub(r"://[^/\s]+@", "://***@", text)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The tail of an error sentence: the nearest right name, or all of them when they are few.

    >>> did_you_mean("hdc", ["kd", "hcd"])
    "did you mean 'hcd'?"
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    if len(known) <= 12:
        return "known: " + ", ".join(known)
    return f"none of the {len(known)} known names is near it"
