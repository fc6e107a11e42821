"""model.safetensors and config.json: timm opens them where it can build the network, else `heterokd.load_student`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from heterokd.errors import CheckpointError
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.networks.timm_folder import open_timm_folder, timm_config
from heterokd.networks.weights import load_weights, save_weights
from heterokd.storage.files import read_json, write_text
from heterokd.storage.typed_json import parse
from heterokd.students.export.format import ExportFormat, Opened, ToWrite
from heterokd.training.task_modules import upsample

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Safetensors(ExportFormat):
    """The weights alone, with all that is needed to build the network again."""

    files = (WEIGHTS, CONFIG)
    libraries = ("torch", "timm", "safetensors")
    is_graph = False

    def write(self, student: ToWrite, folder: Path) -> None:
        """Write the weights, and timm's configuration where timm can build the network from it."""
        save_weights(student.network, folder / WEIGHTS)
        ours = {"heterokd": dict(student.card)}
        config = timm_config(student.network, parse(list[str], student.card["class_names"]))
        if config is not None:
            write_text(folder / CONFIG, json.dumps({**config, **ours}, indent=1))
            # timm refuses the options of Mixer and ResMLP, so whether it opens the folder is tried, not assumed.
            with suppress(Exception):
                open_timm_folder(folder)
                return
        write_text(folder / CONFIG, json.dumps(ours, indent=1))

    def open(self, folder: Path) -> Opened:
        """Open them with timm where they were written for it."""
        network = open_exported(folder)
        if set(read_json(folder / CONFIG)) != {"heterokd"}:
            body = open_timm_folder(folder)

            def run_by_timm(images: Tensor) -> Tensor:
                logits: Tensor = body((images - network.mean) / network.std)
                return logits

            return Opened(run_by_timm, 'timm.create_model("local-dir:FOLDER", pretrained=True)', normalises=False)

        def run(images: Tensor) -> Tensor:
            logits: Tensor = network(images).logits
            return upsample(logits, images.shape[-2:]) if logits.dim() == 4 else logits

        return Opened(run, "heterokd.load_student(FOLDER)")


def open_exported(folder: str | Path) -> AnyNetwork:
    """The student of a folder that `heterokd export --format safetensors` wrote, in evaluation mode on the CPU.

    It takes RGB images [B, 3, H, W] in [0, 1] and gives `Outputs`: `open_exported(folder)(images).logits`.

    Raises:
        CheckpointError: files are missing, damaged, or not those of such an export.
    """
    folder = Path(folder)
    config: Any = read_json(folder / CONFIG).get("heterokd")
    if not isinstance(config, dict) or not {"network", "options", "num_classes", "image_size"} <= set(config):
        raise CheckpointError(f"{folder / CONFIG}: is missing or not that of an exported student; export it again")
    mean, std = config.get("mean"), config.get("std")
    network = build_network(
        config["network"],
        config["num_classes"],
        config["options"],
        image_size=config["image_size"],
        normalisation=(mean, std) if mean and std else None,
    )
    load_weights(network, folder / WEIGHTS)
    return network.eval()
