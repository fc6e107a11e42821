"""Build smp's segmentation networks by name and options, and determine their output shapes."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import timm
import torch
from timm.layers.helpers import to_2tuple
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heterokd.errors import NetworkError, did_you_mean
from heterokd.networks.bodies import first_line, options_as_json, timm_options, unknown_argument
from heterokd.networks.body_types import SegmentationBody
from heterokd.networks.openmmlab import STAGE_NORM, StageNormDecoder
from heterokd.networks.segmentation_encoders import (
    PYRAMID_OPTION,
    STRIDES,
    EncoderClass,
    HieraEncoder,
    MapsEncoder,
    PyramidEncoder,
    encoder_class,
    registered,
)
from heterokd.networks.segmentation_names import UNDILATED, smp_class, smp_encoders, split_name
from heterokd.outputs import Kind, OutputSpec, Signal, StageSpec

SERVES = Signal.LOGITS | Signal.EMBEDDING | Signal.STAGES
DEFAULT_SIZE = 512  # the crop of ADE20K in most papers; smp's networks have no default size
STAGES = 4
DEEPLABS = ("deeplabv3", "deeplabv3plus")
DILATED = ("deeplabv3", "deeplabv3plus", "pspnet", "pan")  # architectures that reduce the stride of their encoder
PSPNET_STRIDE = 8  # as in the paper; smp's class leaves the encoder's last two stages out instead
VIT_PATCH = 16  # the only patch size whose maps DPT's decoder joins; weights of other patches are resampled by timm
_INITIAL = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}
# smp's arguments that the name, the data set or this package determines
_DECIDED = {
    "encoder_name",
    "encoder_weights",
    "in_channels",
    "classes",
    "activation",
    "upsampling",
    "aux_params",
    "kwargs",
}


@dataclass(frozen=True)
class SegmentationLayout:
    """Structure of a segmentation network, before it is built.

    Attributes:
        arguments: smp's arguments in addition to the name.
        multiple: number of pixels of which height and width of the body's input are multiples.
        spec: shapes of the outputs.
    """

    arguments: Mapping[str, object]
    multiple: int
    spec: OutputSpec


class _WithoutValues(TorchFunctionMode):
    """Skip the computation of initial values on the meta device, which takes seconds in a deep Transformer.

    A linspace is computed on the CPU, since MiT's constructor reads its numbers.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if args and getattr(func, "__name__", "") in _INITIAL:  # a method of the tensor, not of nn.init
            return args[0]
        device = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **device})


def lay_out(
    name: str, num_classes: int, options: Mapping[str, object] | None, image_size: int | None
) -> SegmentationLayout:
    """Determine arguments and output shapes of a network from its structure; cached, without weights or memory.

    Raises:
        NetworkError: architecture, encoder or option is unknown, or they are incompatible.
    """
    key = options_as_json(name, num_classes, options, image_size)
    return _lay_out(name, num_classes, key, image_size or DEFAULT_SIZE)


@lru_cache(maxsize=256)
def _lay_out(name: str, num_classes: int, options: str, image_size: int) -> SegmentationLayout:
    architecture, encoder = split_name(name)
    arguments: dict[str, object] = json.loads(options)
    known = _options_of(architecture, encoder)
    for key in arguments:
        if key not in known:
            raise NetworkError(f"network {name!r} has no option {key!r}: {did_you_mean(key, known)}")
    if encoder not in smp_encoders():
        if "strict_img_size" in known:  # Swin: images of any size, not only the size it is built for
            arguments.setdefault("strict_img_size", False)
        if "img_size" in known:
            arguments.setdefault("img_size", -(-image_size // UNDILATED) * UNDILATED)
    kind = _maps_encoder(architecture, encoder)
    if architecture == "dpt" or kind is PyramidEncoder:
        _prepare_vit(architecture, encoder, arguments, known)
    if kind is HieraEncoder:  # which follows the size of each batch
        arguments.pop("img_size", None)
    if architecture == "pspnet" and arguments.setdefault("encoder_depth", 5) != 5:
        raise NetworkError(f"network {name!r}: encoder_depth must be 5, so that its encoder gives {STAGES} maps")
    try:
        return SegmentationLayout(arguments, *_measure(name, num_classes, arguments, image_size))
    except NetworkError:
        if architecture not in DILATED or "encoder_output_stride" in arguments:
            raise
    arguments["encoder_output_stride"] = UNDILATED
    return SegmentationLayout(arguments, *_measure(name, num_classes, arguments, image_size))


def _prepare_vit(architecture: str, encoder: str, arguments: dict[str, object], known: Sequence[str]) -> None:
    """Set the options with which a plain ViT is an encoder of a decoder, unless they are given."""
    if "dynamic_img_size" in known:  # images of any size
        arguments.setdefault("dynamic_img_size", True)
    with torch.device("meta"), _WithoutValues():
        plain = timm.create_model(encoder.partition(".")[0])
    patch = to_2tuple(getattr(getattr(plain, "patch_embed", None), "patch_size", VIT_PATCH))
    needs_others = patch[0] != VIT_PATCH if architecture == "dpt" else patch[0] not in STRIDES[1:]
    if needs_others and "patch_size" in known:
        arguments.setdefault("patch_size", VIT_PATCH)
    if "decoder_readout" in known and not getattr(plain, "num_prefix_tokens", 0):
        arguments.setdefault("decoder_readout", "ignore")


def create_segmentation_body(
    name: str, num_classes: int, arguments: Mapping[str, object], pretrained: bool = False
) -> SegmentationBody:
    """Build the plain smp module.

    Raises:
        NetworkError: an option is impossible, or the encoder's pretrained weights cannot be downloaded.
    """
    try:
        return cast(SegmentationBody, _create(name, num_classes, arguments, pretrained))
    except NetworkError:
        raise
    except Exception as error:  # smp's and timm's constructors raise any exception of their layers
        sentence = f"{first_line(error)} ({type(error).__name__})"
        if pretrained:
            raise NetworkError(f"network {name!r}: its encoder's weights cannot be loaded: {sentence}") from error
        if isinstance(error, ValueError) and "downsampling pattern" in str(error):
            raise NetworkError(
                f"network {name!r}: its encoder does not give maps at strides 4, 8, 16 and 32; "
                "use a ResNet, MobileNet, ConvNeXt, MiT, PVTv2, Swin, Hiera or a plain ViT instead"
            ) from error
        if unknown_argument(error) == "output_stride":
            raise _cannot_dilate(name, arguments) from error
        raise NetworkError(f"network {name!r} cannot be built with options {dict(arguments)}: {sentence}") from error


def _create(name: str, num_classes: int, arguments: Mapping[str, object], pretrained: bool) -> nn.Module:
    architecture, encoder = split_name(name)
    kind = _maps_encoder(architecture, encoder)
    if kind is not None:
        of_decoder = _arguments_of(architecture).keys() | {"encoder_output_stride", STAGE_NORM}
        options = {key: value for key, value in arguments.items() if key not in of_decoder}
        with registered(kind, encoder, pretrained, options) as key:
            rest = {key: value for key, value in arguments.items() if key in of_decoder}
            return _assembled(name, key, None, num_classes, rest)
    of_smp = encoder in smp_encoders() and architecture != "dpt"  # which has timm's alone
    encoder_name = encoder if of_smp else f"tu-{encoder}"
    weights = ("imagenet" if of_smp else True) if pretrained else None
    return _assembled(name, encoder_name, weights, num_classes, dict(arguments))


def _assembled(
    name: str, encoder_name: str, weights: str | bool | None, num_classes: int, arguments: dict[str, object]
) -> nn.Module:
    """Build smp's decoder on an encoder that smp knows as `encoder_name`."""
    architecture, _ = split_name(name)
    stage_norm = arguments.pop(STAGE_NORM, False)
    if stage_norm:
        whole = smp_class(architecture)(encoder_name, encoder_weights=weights, classes=num_classes, **arguments)
        encoder, last = cast(SegmentationBody, whole).encoder, cast(SegmentationBody, whole).segmentation_head[0]
        channels = cast(Sequence[int], encoder.out_channels)
        whole.decoder = StageNormDecoder(channels, cast(int, last.in_channels))
        return whole
    if architecture == "pspnet":
        stride = arguments.pop("encoder_output_stride", PSPNET_STRIDE)
        if stride != UNDILATED:
            arguments["output_stride"] = stride
    if architecture not in DEEPLABS or arguments.get("encoder_output_stride") != UNDILATED:
        return smp_class(architecture)(encoder_name, encoder_weights=weights, classes=num_classes, **arguments)

    del arguments["encoder_output_stride"]
    defaults = _arguments_of(architecture)
    if arguments.pop("encoder_depth", 5) != 5:
        raise NetworkError(f"network {name!r}: encoder_depth must be 5 where encoder_output_stride is {UNDILATED}")
    decoder = {
        key.removeprefix("decoder_"): arguments.pop(key, default)
        for key, default in defaults.items()
        if key.startswith("decoder_")
    }
    decoder["out_channels"] = decoder.pop("channels")
    from heterokd.networks.segmentation_undilated import UndilatedDeepLab  # imports smp, which classifiers never need

    return UndilatedDeepLab(architecture, encoder_name, weights, num_classes, arguments, decoder)


def _options_of(architecture: str, encoder: str) -> list[str]:
    """List the names of the options: smp's, and for an encoder from timm also timm's."""
    known = [*_arguments_of(architecture), *(["encoder_output_stride"] if architecture == "pspnet" else [])]
    if _maps_encoder(architecture, encoder) is PyramidEncoder:
        known.append(PYRAMID_OPTION)
    if architecture == "segformer":
        known.append(STAGE_NORM)
    return known if encoder in smp_encoders() else [*known, *timm_options(encoder.partition(".")[0])]


def _maps_encoder(architecture: str, encoder: str) -> EncoderClass | None:
    """Return the class of an encoder that smp's universal encoder does not take; DPT reads plain ViTs itself."""
    return None if architecture == "dpt" or encoder in smp_encoders() else encoder_class(encoder)


def _arguments_of(architecture: str) -> dict[str, object]:
    """Return the arguments of smp's class that may be set, with their defaults."""
    parameters = inspect.signature(smp_class(architecture)).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in _DECIDED}


def _measure(name: str, num_classes: int, arguments: Mapping[str, object], image_size: int) -> tuple[int, OutputSpec]:
    """Determine the multiple of the image's sides and the spec by a forward on the meta device."""
    with torch.device("meta"), _WithoutValues():
        body = create_segmentation_body(name, num_classes, arguments).eval()
    # DPT's decoder makes maps of strides 4 to 32 from those of a single stride.
    multiple = math.lcm(int(body.encoder.output_stride), UNDILATED if name.startswith("dpt-") else 1)
    attention: set[int] = set()  # channels of the inputs of attention layers

    def attend(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        attention.update(given[0].shape[1:])

    hooks = [
        module.register_forward_pre_hook(attend) for module in body.encoder.modules() if hasattr(module, "num_heads")
    ]
    side = -(-image_size // multiple) * multiple
    asked = arguments.get("encoder_output_stride")
    if isinstance(body.encoder, MapsEncoder):
        attention = set(body.encoder.out_channels)
    if hooks and name.partition("-")[0] in DILATED and asked != UNDILATED:
        raise _cannot_dilate(name, arguments)
    try:
        with torch.no_grad():
            features = body.encoder(torch.empty(1, 3, side, side, device="meta"))
            maps = stage_maps(features)
            logits, embedding = classify(body, features)
            for hook in hooks:
                hook.remove()
            classify(body, body.encoder(torch.empty(1, 3, side + multiple, side, device="meta")))
    except Exception as error:  # any layer may raise on a size
        raise NetworkError(
            f"network {name!r} does not run on images of any size (tried {side} x {side} and {side + multiple} x "
            f"{side}): {first_line(error)}"
        ) from error
    if len(maps) < STAGES:
        raise NetworkError(f"network {name!r}: its encoder gives {len(maps)} maps, {STAGES} are needed (encoder_depth)")
    strides = [side // y.shape[-1] for y in maps]
    if asked is not None and strides[-1] != asked:
        raise NetworkError(
            f"network {name!r}: its encoder has a stride of {strides[-1]} with encoder_output_stride: {asked}"
        )
    stages = tuple(
        StageSpec(y.shape[1], stride, _kind(y.shape[1], attention)) for y, stride in zip(maps, strides, strict=True)
    )
    return math.lcm(multiple, *strides), OutputSpec(
        num_classes, int(embedding.shape[1]), stages, image_size, serves=SERVES, logits_stride=side // logits.shape[-1]
    )


def _kind(channels: int, attention: set[int]) -> Kind:
    return "attention" if channels in attention else "cnn"


def _cannot_dilate(name: str, arguments: Mapping[str, object]) -> NetworkError:
    return NetworkError(
        f"network {name!r}: its encoder keeps its stride of {UNDILATED} and cannot be dilated to "
        f"{arguments.get('encoder_output_stride', 'less')}: set options.encoder_output_stride to {UNDILATED} "
        "or leave it out"
    )


Features = list[Tensor] | tuple[list[Tensor], list[Tensor | None]]
"""Output of smp's encoders: maps from the image on; of DPT's the maps, and the tokens without a position."""


def stage_maps(features: Features) -> tuple[Tensor, ...]:
    """Return the encoder's last four maps [B, C, H, W], without the image and, in Transformers, smp's empty map."""
    if isinstance(features, tuple):
        return tuple(features[0][-STAGES:])
    return tuple(y for y in features[1:] if y.shape[1])[-STAGES:]


def classify(body: SegmentationBody, features: Features) -> tuple[Tensor, Tensor]:
    """Compute logits [B, K, h, w] and embedding [B, D, h, w] at the decoder's stride, without smp's upsampling."""
    embedding: Tensor = body.decoder(*features) if isinstance(features, tuple) else body.decoder(features)
    before, last = head_of(body)
    embedding = before(embedding)
    logits: Tensor = last(embedding)
    return logits, embedding


def head_of(body: SegmentationBody) -> tuple[nn.Sequential, nn.Module]:
    """Return the layers between decoder and last convolution, of DPT alone, and the last convolution."""
    head = getattr(body.segmentation_head, "head", None)
    return (nn.Sequential(), body.segmentation_head[0]) if head is None else (head[:-1], head[-1])
