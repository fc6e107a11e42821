"""Names of segmentation networks, `{architecture}-{encoder}`: what they mean, without building one.

Architectures are decoders of segmentation_models_pytorch (smp). Encoders are smp's own, or any network of timm that
gives maps at strides 4, 8, 16 and 32. No name of timm's holds a hyphen before its tag, so a hyphen there is what tells
the two kinds of network apart.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import timm

from heterokd.errors import NetworkError, did_you_mean

# smp's class of each decoder. smp itself is imported at its first use: classifiers never need it.
ARCHITECTURES = {
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3Plus",
    "segformer": "Segformer",
    "upernet": "UPerNet",
    "fpn": "FPN",
}
UNDILATED = 32  # the stride of every encoder that is left as it is
# smp's doubles of timm's networks are deprecated there, and these families' weights want images of another mean
_LEFT_OUT = ("timm-", "dpn", "inception", "xception")


def smp_class(architecture: str) -> Any:
    """The class of smp's that an architecture is."""
    import segmentation_models_pytorch as smp

    return getattr(smp, ARCHITECTURES[architecture])


@lru_cache(maxsize=1)
def smp_encoders() -> frozenset[str]:
    """Names of smp's own encoders that have weights of ImageNet."""
    import segmentation_models_pytorch as smp

    return frozenset(
        name
        for name, settings in smp.encoders.encoders.items()
        if "imagenet" in settings["pretrained_settings"] and not name.startswith(_LEFT_OUT)
    )


def is_segmentation(name: str) -> bool:
    """Whether a name is of the form `{architecture}-{encoder}`."""
    return "-" in name.partition(".")[0]


def split_name(name: str) -> tuple[str, str]:
    """Architecture and encoder.

    Raises:
        NetworkError: one of them is unknown.
    """
    architecture, _, encoder = name.partition("-")
    if architecture not in ARCHITECTURES:
        known = [*timm.list_models(), *(f"{known}-{encoder}" for known in ARCHITECTURES)]
        raise NetworkError(
            f"network {name!r}: {architecture!r} is not a segmentation architecture (known: "
            f"{', '.join(ARCHITECTURES)}; a classifier's name holds no hyphen): {did_you_mean(name, known)}"
        )
    untagged = encoder.partition(".")[0]
    if encoder not in smp_encoders() and not timm.is_model(untagged):
        known = [*smp_encoders(), *timm.list_models()]
        raise NetworkError(f"network {name!r}: there is no encoder {encoder!r}: {did_you_mean(untagged, known)}")
    return architecture, encoder


def segmentation_names(pattern: str = "") -> list[str]:
    """Every architecture on every encoder of smp's own, filtered by a shell pattern; timm's encoders are not listed."""
    names = [f"{architecture}-{encoder}" for architecture in ARCHITECTURES for encoder in sorted(smp_encoders())]
    return [name for name in names if not pattern or fnmatchcase(name, pattern)]
