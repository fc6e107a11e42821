"""Build timm's networks by name; `architectures` adds networks to timm's list."""

from __future__ import annotations

import inspect
import json
import re
import socket
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from timm.models import build_model_with_cfg, model_entrypoint
from torch import nn

import heterokd.networks.architectures  # noqa: F401 - registers its networks with timm
from heterokd.errors import NetworkError, did_you_mean
from heterokd.networks.body_types import TimmBody
from heterokd.networks.modules import create_module, is_built_elsewhere
from heterokd.networks.segmentation_names import encoder_repository, is_segmentation, segmentation_names

HUB = ("hf-hub:", "hf_hub:")
"""What the names of networks on Hugging Face's hub start with."""
CONNECT_TIMEOUT = 5.0
"""Timeout of a connection to the host of the weights, in seconds."""


class UnknownOption(NetworkError):
    """A network has no such option. The sentence lists its options; they are only looked up when it is read."""

    def __init__(self, network: str, option: str) -> None:
        super().__init__(network, option)
        self.network, self.option = network, option

    def __str__(self) -> str:
        options = ", ".join(timm_options(self.network))
        return f"network {self.network!r} has no option {self.option!r}; its options: {options}"


def network_names(pattern: str = "") -> list[str]:
    """List names of timm's and of segmentation networks, filtered by a shell pattern such as `"vit_*"`."""
    return timm.list_models(pattern) + segmentation_names(pattern)


def timm_name(name: str) -> str:
    """Return timm's name of a name on its hub, `hf-hub:timm/NAME`; other names as they are.

    Raises:
        NetworkError: the network is of another repository of the hub.
    """
    if not name.startswith(HUB):
        return name
    owner, _, rest = name[len(HUB[0]) :].partition("/")
    plain = rest.partition("@")[0]
    if owner != "timm" or not timm.is_model(plain.partition(".")[0]):
        raise NetworkError(
            f"network {name!r}: of the hub's networks those of timm are known, hf-hub:timm/NAME; download the weights "
            "of others, and set `network` to timm's name of the architecture and `checkpoint` to the file"
        )
    return plain


def no_weights(name: str) -> str | None:
    """Return within seconds why timm's weights of a name are unavailable here, in a few words; None if available.

    Those of a segmentation network are its encoder's.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    hub_id, url = encoder_repository(name) if is_segmentation(name) else None, ""
    if hub_id is None:
        config = timm.get_pretrained_cfg(name.partition("-")[2] if is_segmentation(name) else timm_name(name))
        if config is None or not config.has_weights:
            return "timm publishes none"
        hub_id, url = config.hf_hub_id, str(config.url)
    files = ("model.safetensors", "pytorch_model.bin")
    if hub_id and any(isinstance(try_to_load_from_cache(hub_id, file), str) for file in files):
        return None
    address = urlsplit(constants.ENDPOINT if hub_id else url)
    if getproxies().get(address.scheme) or constants.HF_HUB_OFFLINE:
        return "downloads are switched off" if constants.HF_HUB_OFFLINE else None
    try:
        # Checked first: a download retries for a minute before it fails.
        socket.create_connection((address.hostname or "", address.port or 443), CONNECT_TIMEOUT).close()
    except OSError as error:
        return f"no connection: {error.strerror or error}"
    return None


def options_as_json(name: str, num_classes: int, options: Mapping[str, object] | None, image_size: int | None) -> str:
    """Check the arguments of a network, and return its options as a key for caches.

    Raises:
        NetworkError: a number is not positive, or the options are not JSON.
    """
    for key, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value is not None and value < 1:
            raise NetworkError(f"network {name!r}: {key} must be at least 1, got {value}")
    try:
        return json.dumps(dict(options or {}), sort_keys=True)
    except TypeError as error:
        raise NetworkError(f"network {name!r}: options must be numbers, words and lists of them ({error})") from error


def create_body(name: str, num_classes: int, arguments: Mapping[str, object], pretrained: bool = False) -> TimmBody:
    """Build the plain timm module.

    Raises:
        NetworkError: unknown name, unknown or impossible option, or pretrained weights that cannot be downloaded.
    """
    if is_built_elsewhere(name, arguments):
        return cast(TimmBody, create_module(name, num_classes, arguments, pretrained))
    name = timm_name(name)
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise NetworkError(f"network {name!r} is not one of timm's: {did_you_mean(architecture, timm.list_models())}")
    try:
        return cast(TimmBody, _create(name, num_classes, arguments, pretrained))
    except Exception as error:  # timm's constructors raise any exception of their layers
        unknown = unknown_argument(error)
        if unknown is not None and unknown in arguments:
            raise UnknownOption(name, unknown) from error
        sentence = f"{first_line(error)} ({type(error).__name__})"
        if pretrained:
            raise NetworkError(f"network {name!r}: its pretrained weights cannot be loaded: {sentence}") from error
        raise NetworkError(f"network {name!r} cannot be built with options {dict(arguments)}: {sentence}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return str(error).strip().split("\n", 1)[0]


def unknown_argument(error: Exception) -> str | None:
    """Return the name of the argument that a constructor does not take, or None if the exception has another cause."""
    found = re.search(r"unexpected keyword argument(?:\(s\))?\W+(\w+)", str(error))
    return found[1] if found else None


def _create(name: str, num_classes: int, arguments: Mapping[str, object], pretrained: bool) -> nn.Module:
    create_model: Callable[..., nn.Module] = timm.create_model
    try:
        return create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    except TypeError as error:
        if "multiple values for keyword argument" not in str(error):
            raise
    # Some of timm's entry points (Mixer, ResMLP) call `dict(patch_size=16, **kwargs)`, which fails for such an option.
    # Run copies of the functions of the entry point's module in which the last step, building the class, takes ours.
    architecture, _, tag = name.partition(".")
    entry = model_entrypoint(architecture)
    namespace = vars(sys.modules[entry.__module__])
    copied: dict[str, object] = dict(namespace)
    for key, value in namespace.items():
        if isinstance(value, FunctionType) and value.__globals__ is namespace:
            function = FunctionType(value.__code__, copied, key, value.__defaults__, value.__closure__)
            function.__kwdefaults__ = value.__kwdefaults__
            copied[key] = function
    build_model: Callable[..., nn.Module] = build_model_with_cfg

    def build(*args: object, **kwargs: object) -> nn.Module:
        return build_model(*args, **(kwargs | dict(arguments)))

    copied["build_model_with_cfg"] = build
    create = cast(Callable[..., nn.Module], copied[entry.__name__])
    return create(pretrained=pretrained, num_classes=num_classes, pretrained_cfg=tag or None)


def timm_options(name: str) -> list[str]:
    """List the arguments of timm's class of a network, without the number of classes."""
    with torch.device("meta"):
        classes = type(timm.create_model(name)).__mro__
    known = {key: None for cls in classes if cls.__module__ != nn.Module.__module__ for key in _parameters(cls)}
    return [key for key in known if key not in {"device", "dtype", "num_classes"}]


def _parameters(cls: type) -> list[str]:
    """List the named parameters of the constructor that a class itself defines, without self."""
    if "__init__" not in vars(cls):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in named][1:]


def published_licence(name: str) -> str:
    """Return timm's licence of the published weights of a name, or of a segmentation network's encoder."""
    if is_built_elsewhere(name, {}):
        return "unknown"
    encoder = name.partition("-")[2] if is_segmentation(name) else timm_name(name)
    config = timm.get_pretrained_cfg(encoder, allow_unregistered=True)
    return str(getattr(config, "license", None) or "unknown (timm states none)")


def published_classes(name: str) -> int:
    """Return the number of classes of timm's published weights of a network; 0 for a network that timm does not build.

    A segmentation network's weights are only the encoder's: they initialise a training, but are no trained teacher.

    Raises:
        NetworkError: timm publishes no weights for it.
    """
    if is_segmentation(name) or is_built_elsewhere(name, {}):
        return 0
    config = timm.get_pretrained_cfg(timm_name(name), allow_unregistered=True)
    if config is None or not config.has_weights:
        raise NetworkError(f"network {name!r}: timm publishes no weights for it; set pretrained: false")
    return int(config.num_classes)
