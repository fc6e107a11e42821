"""Networks that timm does not build: a user's module, and torchvision's classifiers.

    ./nets.py:make_student      a function or class in a file; the settings hold the file's text as the option `module`
    package.module:callable     of an installed package
    torchvision:NAME            of `torchvision.models`

A user's function is called as `make_student(num_classes=K, **options)` and returns a module from images [B, 3, H, W] to
logits [B, K], or to an object with the attribute `logits`. If it has the parameter `img_size`, it gets the image size.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from heterokd.errors import ConfigError, NetworkError, did_you_mean
from heterokd.extensions import object_of_text
from heterokd.networks.body_types import Normalisation

MODULE = "module"
"""Option that holds the file of a user's module: `file`, `name` and `text`."""
TAPS = "taps"
"""Option that names the modules of stages and embedding: `stages`, `embedding`."""
OWN_OPTIONS = (MODULE, TAPS)
"""Options that are not passed to the function that builds the network."""
TORCHVISION = "torchvision"
AUXILIARY = ("googlenet", "inception_v3")
"""Networks of torchvision whose output in training mode has further heads, which are switched off."""


def is_built_elsewhere(name: str, options: Mapping[str, object]) -> bool:
    """Whether a network is not timm's: a user's module, or torchvision's."""
    return MODULE in options or (":" in name and not name.startswith(("hf-hub:", "hf_hub:")))


def create_module(name: str, num_classes: int, options: Mapping[str, object], pretrained: bool) -> nn.Module:
    """Build a user's module or a network of torchvision.

    Raises:
        NetworkError: unknown name, unknown or impossible option, weights that are not available, or no module.
    """
    arguments = {key: value for key, value in options.items() if key not in OWN_OPTIONS}
    package, _, found = name.partition(":")
    if package == TORCHVISION and MODULE not in options:
        return _create_torchvision(found, num_classes, arguments, pretrained)
    if pretrained:
        raise NetworkError(
            f"network {name!r}: pretrained is for timm's and torchvision's networks; load weights in the function, or "
            "set teacher.checkpoint"
        )
    module = _call(name, _factory(name, options.get(MODULE)), {"num_classes": num_classes, **arguments})
    if not isinstance(module, nn.Module):
        raise NetworkError(f"network {name!r}: it returned {type(module).__name__}, a torch.nn.Module is needed")
    return module


def takes(name: str, options: Mapping[str, object], parameter: str) -> bool:
    """Whether the function of a network that is built elsewhere has a parameter of this name."""
    if MODULE not in options and name.partition(":")[0] == TORCHVISION:
        return False
    return parameter in inspect.signature(_factory(name, options.get(MODULE))).parameters


def module_normalisation(body: nn.Module) -> Normalisation:
    """Return mean and deviation of a module's `pretrained_cfg`; ImageNet's if it has none."""
    config = getattr(body, "pretrained_cfg", None)
    if isinstance(config, Mapping) and "mean" in config and "std" in config:
        return config["mean"], config["std"]
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def _factory(name: str, module: object) -> Callable[..., object]:
    """Look up a user's function or class.

    Raises:
        NetworkError: the file or package cannot be imported, or has no such name.
    """
    try:
        if isinstance(module, Mapping):
            found = object_of_text(str(module["file"]), str(module["text"]), str(module["name"]))
        else:
            place, _, attribute = name.partition(":")
            try:
                imported = importlib.import_module(place)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise ConfigError(f"{place} cannot be imported ({reason})") from error
            if not hasattr(imported, attribute):
                raise ConfigError(f"{place} has no {attribute!r}; {did_you_mean(attribute, vars(imported))}")
            found = getattr(imported, attribute)
    except ConfigError as error:
        raise NetworkError(f"network {name!r}: {error}") from error
    if not callable(found):
        raise NetworkError(f"network {name!r}: it is no function or class, but a {type(found).__name__}")
    return found


def _call(name: str, function: Callable[..., object], arguments: Mapping[str, object]) -> object:
    try:
        return function(**arguments)
    except Exception as error:  # a user's function raises any exception
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        shown = {key: value for key, value in arguments.items() if key not in OWN_OPTIONS}
        raise NetworkError(f"network {name!r} cannot be built with {shown}: {reason}") from error


def _create_torchvision(name: str, num_classes: int, arguments: Mapping[str, object], pretrained: bool) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise NetworkError(f"network 'torchvision:{name}' is not one of torchvision's: {did_you_mean(name, known)}")
    settings: dict[str, object] = {"num_classes": num_classes, **arguments}
    if name in AUXILIARY:
        settings |= {"aux_logits": False, "init_weights": True}
    body = _call(f"torchvision:{name}", lambda **options: models.get_model(name, **options), settings)
    assert isinstance(body, nn.Module)
    if pretrained and torch.get_default_device().type != "meta":
        try:
            weights = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise NetworkError(
                f"network 'torchvision:{name}': its pretrained weights cannot be loaded: {reason}"
            ) from error
        own = body.state_dict()
        body.load_state_dict(
            {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}, strict=False
        )
    return body
