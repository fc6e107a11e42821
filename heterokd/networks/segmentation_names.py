"""Names of segmentation networks, `{architecture}-{encoder}`: what they mean, without building one.

Architectures are decoders of segmentation_models_pytorch (smp). Encoders are smp's own, or any network of timm that
gives maps at strides 4, 8, 16 and 32. No name of timm's holds a hyphen before its tag, so a hyphen there is what tells
the two kinds of network apart.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import segmentation_models_pytorch as smp
import timm

from heterokd.errors import NetworkError, did_you_mean

ARCHITECTURES: dict[str, type[smp.base.SegmentationModel]] = {
    "deeplabv3": smp.DeepLabV3,
    "deeplabv3plus": smp.DeepLabV3Plus,
    "segformer": smp.Segformer,
    "upernet": smp.UPerNet,
    "fpn": smp.FPN,
}
# smp's doubles of timm's networks are deprecated there, and these families' weights want images of another mean
_LEFT_OUT = ("timm-", "dpn", "inception", "xception")
SMP_ENCODERS = frozenset(
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
    if encoder not in SMP_ENCODERS and not timm.is_model(untagged):
        known = [*SMP_ENCODERS, *timm.list_models()]
        raise NetworkError(f"network {name!r}: there is no encoder {encoder!r}: {did_you_mean(untagged, known)}")
    return architecture, encoder


def segmentation_names(pattern: str = "") -> list[str]:
    """Every architecture on every encoder of smp's own, filtered by a shell pattern; timm's encoders are not listed."""
    names = [f"{architecture}-{encoder}" for architecture in ARCHITECTURES for encoder in sorted(SMP_ENCODERS)]
    return [name for name in names if not pattern or fnmatchcase(name, pattern)]
