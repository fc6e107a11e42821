"""What the commands print with `--json` stays as the first version printed it (tests/golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Run
from golden_files import differences, read, unpack

from heterokd.config.schema import CHANGED_DOMAINS

SCHEMA_OF_STORED = 2
STORED = read("json_outputs.json")

PROSE = {"caveats", "description", "note", "opened_with", "reason", "text", "title", "verdict"}
"""Keys of sentences for people: that they are there is compared, their wording is not."""

MEASURED = {"by_batch", "difference", "latency", "size_mb", "source", "tolerance", "torch_latency"}
MEASURED |= {"device", "device_hours", "device_unit", "disk", "gpu_memory", "memory", "parallel", "phases", "seconds"}
"""Keys of what another machine or another library measures or rounds otherwise."""


LATER = {"reason", "temperature", "train_confidence", "val_confidence"}
"""Keys of a teacher's card that its first version did not write: empty for a teacher of that version."""


def masked(value: Any, root: Path) -> Any:
    """An output without wording, measured figures and the root's path."""
    if isinstance(value, Mapping):
        if "val_score" in value:
            value = {key: part for key, part in value.items() if key not in LATER or part is not None}
        kept = {key: _hidden(key, part) or masked(part, root) for key, part in value.items()}
        if str(value.get("name", "")).startswith(("latency", "largest difference")):
            kept["measured"] = "<measured>"  # a gate of promotion
        return kept
    if isinstance(value, list):
        return [masked(part, root) for part in value]
    return value.replace(str(root), "<root>") if isinstance(value, str) else value


def _hidden(key: str, part: Any) -> Any:
    if key in PROSE and isinstance(part, str):
        return "<words>" if part else "<no words>"
    if key in MEASURED and part is not None:
        return sorted(part) if isinstance(part, Mapping) else "<measured>"
    return None


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the finished study; no command below changes what another reads."""
    return unpack("finished", tmp_path_factory.mktemp("golden"))


def output(run: Callable[..., Mapping[str, Any]], arguments: list[str], root: Path, out: Path) -> Any:
    """What a command prints; `run` gives its JSON."""
    places = {"<root>": root, "<out>": out, "<experiment>": root / "studies/finished/experiment.yaml"}
    words = [places.get(word, word) for word in arguments]
    text = masked(run(*words, "--json"), root)
    return masked(text, out)


@pytest.mark.parametrize("name", [name for name in STORED if name != "plan"])
def test_outputs_stay(name: str, root: Path, cli: Run, tmp_path: Path) -> None:
    stored = STORED[name]
    now = output(lambda *words: cli(*words).last, stored["arguments"], root, tmp_path / "out")
    if name in ("methods", "datasets"):  # those that have been added since are no difference
        names = {entry["name"] for entry in stored["output"][name]}
        now[name] = [entry for entry in now[name] if entry["name"] in names]
    if name.startswith("method "):  # parameters that have been added are no difference either
        names = {parameter["name"] for parameter in stored["output"]["parameters"]}
        now["parameters"] = [parameter for parameter in now["parameters"] if parameter["name"] in names]
        changed = {change.key for change in CHANGED_DOMAINS if change.schema > SCHEMA_OF_STORED}
        for parameter in (*stored["output"]["parameters"], *now["parameters"]):
            if f"methods.{stored['output']['name']}.{parameter['name']}" in changed:
                parameter["domain"] = "changed since"
    if name.startswith("promote"):
        now.pop("champion_student", None)  # added since
    if name == "export":
        assert now.pop("accuracy") is None  # added since: of an int8 student, measured beside float32
    if name == "compare":
        assert now.pop("methods")["kd"] == "the winner"  # added since
    found = [line for line in differences(stored["output"], now) if not line.endswith(".iou_classes: absent before")]
    assert found[:20] == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_plan_stays(cli: Run, tmp_path: Path) -> None:
    """Of a search that has not begun: it starts Ray and times steps."""
    stored, file = STORED["plan"], tmp_path / "experiment.yaml"
    # Before schema 6 references were not repeated.
    file.write_text(yaml.safe_dump({"schema": 5, **stored["experiment"]}), encoding="utf-8")
    now = masked(cli("plan", file, "--json").last, tmp_path)
    assert differences(stored["output"], now)[:20] == []
