"""Parse names of segmentation networks, `{architecture}-{encoder}`, without building a network.

Architectures are decoders of segmentation_models_pytorch (smp). Encoders are smp's, or any network of timm with maps
at strides 4, 8, 16 and 32; of `dpt` any network of timm with maps of equal stride, such as plain ViTs. No name of
timm's contains a hyphen before its tag, so a hyphen there marks a segmentation network.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache

import timm
from torch import nn

from heterokd.errors import NetworkError, did_you_mean

# smp's class of each decoder. smp is imported at its first use, because classifiers never need it.
ARCHITECTURES = {
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3Plus",
    "segformer": "Segformer",
    "upernet": "UPerNet",
    "fpn": "FPN",
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "manet": "MAnet",
    "linknet": "Linknet",
    "pspnet": "PSPNet",
    "pan": "PAN",
    "dpt": "DPT",
}
UNDILATED = 32  # stride of encoders without dilation
# smp deprecates its copies of timm's networks, and the weights of these families need another normalisation
_LEFT_OUT = ("timm-", "dpn", "inception", "xception")


def smp_class(architecture: str) -> Callable[..., nn.Module]:
    """Return smp's class of an architecture."""
    import segmentation_models_pytorch as smp

    found: Callable[..., nn.Module] = getattr(smp, ARCHITECTURES[architecture])
    return found


@lru_cache(maxsize=1)
def smp_encoders() -> frozenset[str]:
    """List names of smp's encoders with ImageNet weights."""
    import segmentation_models_pytorch as smp

    return frozenset(
        name
        for name, settings in smp.encoders.encoders.items()
        if "imagenet" in settings["pretrained_settings"] and not name.startswith(_LEFT_OUT)
    )


def encoder_repository(name: str) -> str | None:
    """Return the hub's repository of the ImageNet weights of an smp encoder; None for timm's encoders."""
    import segmentation_models_pytorch as smp

    _, encoder = split_name(name)
    if encoder not in smp_encoders():
        return None
    repository: str = smp.encoders.encoders[encoder]["pretrained_settings"]["imagenet"]["repo_id"]
    return repository


def is_segmentation(name: str) -> bool:
    """Return whether a name is of the form `{architecture}-{encoder}`."""
    return ":" not in name and "-" in name.partition(".")[0]


def split_name(name: str) -> tuple[str, str]:
    """Split a name into architecture and encoder.

    Raises:
        NetworkError: either is unknown.
    """
    architecture, _, encoder = name.partition("-")
    if architecture not in ARCHITECTURES:
        known = [*timm.list_models(), *(f"{known}-{encoder}" for known in ARCHITECTURES)]
        raise NetworkError(
            f"network {name!r}: {architecture!r} is not a segmentation architecture (known: "
            f"{', '.join(ARCHITECTURES)}; a classifier's name holds no hyphen): {did_you_mean(name, known)}"
        )
    untagged = encoder.partition(".")[0]
    if architecture == "dpt" and not timm.is_model(untagged):
        known = timm.list_models("*vit*")
        raise NetworkError(
            f"network {name!r}: dpt needs an encoder of timm with maps of equal stride, such as vit_tiny_patch16_224; "
            f"{did_you_mean(untagged, known)}"
        )
    if encoder not in smp_encoders() and not timm.is_model(untagged):
        known = [*smp_encoders(), *timm.list_models()]
        raise NetworkError(f"network {name!r}: there is no encoder {encoder!r}: {did_you_mean(untagged, known)}")
    return architecture, encoder


def segmentation_names(pattern: str = "") -> list[str]:
    """List all architectures on all encoders of smp, filtered by a shell pattern; timm's encoders are not listed."""
    decoders = [architecture for architecture in ARCHITECTURES if architecture != "dpt"]  # whose encoders are timm's
    names = [f"{architecture}-{encoder}" for architecture in decoders for encoder in sorted(smp_encoders())]
    return [name for name in names if not pattern or fnmatchcase(name, pattern)]
