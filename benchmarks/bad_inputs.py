"""Bad inputs through the command line: each ends with exit code 2 and a sentence that names its file or key.

    python benchmarks/bad_inputs.py              run all, and print the failures
    python benchmarks/bad_inputs.py --sentences  also print every sentence

All inputs (`bad_input_cases.py`) run in this process, each in a folder that holds a small experiment, `tiny.yaml`. No
work may begin: the first step that would fit a teacher counts as a failure. `tests/test_bad_input.py` runs others.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bad_input_cases import BadInput, all_cases

TINY = """\
name: tiny
data: {dataset: digits, image_size: 32, labels_per_class: 4}
teacher:
  network: test_vit
  options: {img_size: 32, patch_size: 8}
  training: {epochs: 2, warmup_epochs: 0, batch_size: 64, precision: fp32, channels_last: false}
student: {network: test_efficientnet}
training: {epochs: 3, batch_size: 20, learning_rate: 0.05, precision: fp32, channels_last: false}
search:
  space: {methods: [scratch, kd, dkd]}
  trials: 4
  parallel: 1
"""
PREPARING = (
    *("execution.driver", "execution.distill", "execution.reproduce", "cli.cache_build", "execution.match"),
    *("execution.auto", "execution.planning.measure_costs", "teachers.prepare"),
)
"""Modules of heterokd that call `prepare_teacher` or `prepare_teachers`, with which work begins."""
LIMIT_S = 30
"""Seconds after which an input counts as hanging."""


class WorkHasBegun(BaseException):
    """Raised where a bad input got through; not an `Exception`, so that no handler of errors takes it."""


class Hangs(BaseException):
    """Raised when an input takes too long."""


def fault_of(case: BadInput) -> tuple[str | None, str]:
    """Run a bad input in an empty folder.

    Returns:
        Why it was not refused properly, or None; and what stderr says.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name), _environment(case):
        Path("tiny.yaml").write_text(TINY, encoding="utf-8")
        if case.make is not None:
            case.make()
        before = set(_entries())
        code, said = _run(case.words)
        left = set(_entries()) - before
    lines = said.splitlines()
    if isinstance(code, str):
        return code, said
    if code != 2:
        return f"exit code {code}", said
    if "Traceback" in said or not lines:
        return "a traceback" if lines else "no sentence", said
    if lines[0].startswith("Usage: "):
        lines = [line.strip("\u2502| ") for line in lines[3:]]
    elif not all(line.startswith(("error: ", "Error: ")) for line in lines):
        return "a line that is no sentence", said
    if case.names not in " ".join(lines):
        return f"does not name {case.names}", said
    if left:
        return f"leaves {', '.join(sorted(left)[:3])}", said
    return None, said


def _entries() -> Iterator[str]:
    return (str(path) for path in Path().rglob("*") if not path.name.startswith("mlflow.db-"))


@contextlib.contextmanager
def _environment(case: BadInput) -> Iterator[None]:
    names = ("HETEROKD_ROOT", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    kept = {key: value for key, value in os.environ.items() if key not in names}
    with mock.patch.dict(os.environ, {**kept, **case.environment}, clear=True):
        tempfile.tempdir = None
        yield
    tempfile.tempdir = None


def _run(words: list[str]) -> tuple[int | str, str]:
    """Return exit code, or what happened instead of an exit, and stderr of a command."""
    from heterokd.cli.app import main

    def begun(*_: object, **__: object) -> None:
        raise WorkHasBegun

    def late(*_: object) -> None:
        raise Hangs

    said = io.StringIO()
    signal.signal(signal.SIGALRM, late)
    _forget_data()
    try:
        with contextlib.ExitStack() as stack:
            for module in PREPARING:
                for name in ("prepare_teacher", "prepare_teachers"):
                    with contextlib.suppress(AttributeError):
                        stack.enter_context(mock.patch(f"heterokd.{module}.{name}", begun))
            stack.enter_context(contextlib.redirect_stderr(said))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            signal.alarm(LIMIT_S)
            main(words)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0, said.getvalue()
    except WorkHasBegun:
        return "work has begun", said.getvalue()
    except Hangs:
        return f"hangs longer than {LIMIT_S} s", said.getvalue() + traceback.format_exc()
    except BaseException as error:  # noqa: BLE001  whatever ends the command is a failure of the case
        return f"{type(error).__name__}: {error}", said.getvalue() + traceback.format_exc()
    finally:
        signal.alarm(0)
    return "no exit", said.getvalue()


def _forget_data() -> None:
    """Relative names mean another folder for each input."""
    import heterokd.datasets
    import heterokd.training.data

    heterokd.training.data._splits.cache_clear()
    heterokd.datasets._load.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--sentences", action="store_true", help="print every sentence")
    parser.add_argument("--only", default="", help="kinds and titles that contain this text")
    arguments = parser.parse_args()
    began, kinds, failed = time.perf_counter(), Counter[str](), 0
    for case in all_cases():
        if arguments.only not in f"{case.kind}: {case.title}":
            continue
        kinds[case.kind] += 1
        fault, said = fault_of(case)
        if fault is not None or arguments.sentences:
            print(
                f"{'ok' if fault is None else 'FAILED'}  {case.kind}: {case.title}  {fault or ''}\n    {said.strip()}"
            )
        failed += fault is not None
    seconds = time.perf_counter() - began
    print(f"{kinds.total()} bad inputs, {failed} not refused properly, {seconds:.0f} s: {dict(kinds)}")
    if arguments.out:
        content = {"inputs": kinds.total(), "failed": failed, "kinds": dict(kinds)}
        arguments.out.write_text(json.dumps(content, indent=1), encoding="utf-8")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
