"""model.safetensors and config.json, for timm if it can build the network, else for `heterokd.load_student`."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from heterokd.errors import CheckpointError
from heterokd.networks.network import AnyNetwork, build_network
from heterokd.networks.timm_folder import CONFIG, WEIGHTS, open_timm_folder, timm_config
from heterokd.networks.weights import load_weights, save_weights
from heterokd.storage.files import read_json, write_text
from heterokd.storage.typed_json import parse
from heterokd.students.export.format import ExportFormat, Opened, ToWrite
from heterokd.training.meters import upsample


class Safetensors(ExportFormat):
    """safetensors: the weights alone, with the description of the network."""

    files = (WEIGHTS, CONFIG)
    libraries = ("torch", "timm", "safetensors")
    is_graph = False

    def write(self, student: ToWrite, folder: Path) -> None:
        """Write the weights, and timm's configuration if timm can build the network from it."""
        save_weights(student.network, folder / WEIGHTS)
        described = {"heterokd": dict(student.card)}
        config = timm_config(student.network, parse(list[str], student.card["class_names"]))
        if config is not None:
            write_text(folder / CONFIG, json.dumps({**config, **described}, indent=1))
            # timm refuses the options of some networks, such as Mixer and ResMLP.
            with suppress(Exception):
                open_timm_folder(folder)
                return
        write_text(folder / CONFIG, json.dumps(described, indent=1))

    def open(self, folder: Path) -> Opened:
        """Open the folder with timm if it was written for timm."""
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


@dataclass(frozen=True)
class _Card:
    """The part of `network_card` that is needed to build the network."""

    network: str
    options: dict[str, object]
    num_classes: int
    image_size: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def open_exported(folder: str | Path) -> AnyNetwork:
    """Open a student that `heterokd export --format safetensors` wrote, in evaluation mode on the CPU.

    It maps RGB images [B, 3, H, W] in [0, 1] to `Outputs`: `open_exported(folder)(images).logits`.

    Raises:
        CheckpointError: files are missing, damaged, or not of such an export.
    """
    folder = Path(folder)
    try:
        card = parse(_Card, read_json(folder / CONFIG).get("heterokd"))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: is not of an exported student ({error}); export it again") from None
    normalisation = (card.mean, card.std) if card.mean and card.std else None
    network = build_network(
        card.network, card.num_classes, card.options, image_size=card.image_size, normalisation=normalisation
    )
    load_weights(network, folder / WEIGHTS)
    return network.eval()
