"""Networks of the papers' tables that timm lacks, registered with timm, so that timm builds and lists them.

    swin_pico, swin_nano    Swin-P and Swin-N of OFA-KD: Swin-T with 2-2-2-2 blocks and 48 or 64 channels
    vgg8, resnet20          the small networks of CRD's comparison, designed for 32 pixels
    shufflenet_v2           ShuffleNetV2 1.0x, torchvision's

Sources: Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation, NeurIPS
2023, https://arxiv.org/abs/2310.19444. Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020,
https://arxiv.org/abs/1910.10699. Ma et al., ShuffleNet V2, ECCV 2018, https://arxiv.org/abs/1807.11164.

None has published weights here. vgg8, resnet20 and shufflenet_v2 average the last map over its positions and apply one
linear layer. resnet20 and shufflenet_v2 have three stages of blocks: their first stage is what precedes those.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torchvision.models import shufflenetv2

from heterokd.networks.body_types import FeatureInfo, TimmBody


class _Averaging(TimmBody):
    """Network whose head is the mean over positions and the linear layer `fc`."""

    num_features: int
    fc: nn.Linear

    @property
    def head_hidden_size(self) -> int:
        """Number of channels D of the embedding."""
        return self.num_features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits [B, K], or the embedding [B, D], from the last map [B, D, H, W]."""
        embedding = x.mean(dim=(2, 3))
        return embedding if pre_logits else self.fc(embedding)

    def get_classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self.fc

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map [B, D, h, w] of images [B, 3, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, K]."""
        return self.forward_head(self.forward_features(x))


def _feature_info(widths: tuple[int, ...], strides: tuple[int, ...], modules: tuple[str, ...]) -> list[FeatureInfo]:
    return [
        {"num_chs": width, "reduction": stride, "module": module}
        for width, stride, module in zip(widths, strides, modules, strict=True)
    ]


def _initialise(network: nn.Module) -> None:
    """Initialise convolutions as He et al. 2015 (fan out); norms keep 1 and 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class VGG8(_Averaging):
    """Five convolutions with BatchNorm and ReLU, a 2x2 pooling after each but the last.

    Args:
        num_classes: K of the logits.
        img_size: height = width of the images; below 64 pixels the fourth pooling is omitted, as in CRD's code.
        widths: channels of the five convolutions.
    """

    def __init__(
        self, num_classes: int = 1000, img_size: int = 32, widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = widths[-1]
        layers: list[nn.Module] = []
        self.feature_info = []
        channels, stride = 3, 1
        for number, width in enumerate(widths):
            if number in (1, 2, 3) or (number == 4 and img_size >= 64):
                layers.append(nn.MaxPool2d(2))
                stride *= 2
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            self.feature_info.append({"num_chs": width, "reduction": stride, "module": f"features.{len(layers) - 1}"})
            channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map [B, D, h, w] of images [B, 3, H, W]."""
        features: Tensor = self.features(x)
        return features


class ResNet20(_Averaging):
    """A 3x3 convolution and three stages of basic blocks.

    Args:
        num_classes: K of the logits.
        blocks: basic blocks per stage; 3 make ResNet-20, 5 ResNet-32, 9 ResNet-56.
        widths: channels of the first convolution and of the three stages.
    """

    def __init__(self, num_classes: int = 1000, blocks: int = 3, widths: tuple[int, ...] = (16, 16, 32, 64)) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = widths[-1]
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
                bn=nn.BatchNorm2d(widths[0]),
                act=nn.ReLU(inplace=True),
            )
        )
        self.layer1 = _residual_stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _residual_stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _residual_stage(widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        self.feature_info = _feature_info(widths, (1, 1, 2, 4), ("stem", "layer1", "layer2", "layer3"))
        _initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map [B, D, H / 4, W / 4] of images [B, 3, H, W]."""
        for part in (self.stem, self.layer1, self.layer2, self.layer3):
            x = part(x)
        return x


def _residual_stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride > 1 or before != width:
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    rest = [BasicBlock(width, width) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(before, width, stride, shortcut), *rest)


class ShuffleNetV2(_Averaging):
    """The modules of torchvision's ShuffleNetV2 under the same names, so that weights are interchangeable.

    Args:
        num_classes: K of the logits.
        stages_repeats: blocks of the three stages.
        stages_out_channels: channels of the first convolution, of the three stages and of the last convolution.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        stages_repeats: tuple[int, ...] = (4, 8, 4),
        stages_out_channels: tuple[int, ...] = (24, 116, 232, 464, 1024),
    ) -> None:
        super().__init__()
        whole = shufflenetv2.ShuffleNetV2(list(stages_repeats), list(stages_out_channels), num_classes)
        for name, part in whole.named_children():
            self.add_module(name, part)
        self.num_classes = num_classes
        self.num_features = stages_out_channels[-1]
        self.feature_info = _feature_info(
            (stages_out_channels[0], *stages_out_channels[:4]),
            (2, 4, 8, 16, 32),
            ("conv1", "maxpool", "stage2", "stage3", "stage4"),
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map [B, D, H / 32, W / 32] of images [B, 3, H, W]."""
        for name in ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"):
            x = self.get_submodule(name)(x)
        return x


def _config(first_conv: str, **changes: object) -> dict[str, object]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "fc",
        **changes,
    }


_swin_config = _config("patch_embed.proj", fixed_input_size=True, classifier="head.fc")
default_cfgs = generate_default_cfgs(  # timm reads this name
    {
        "swin_pico.untrained": _swin_config,
        "swin_nano.untrained": _swin_config,
        "vgg8.untrained": _config("features.0", input_size=(3, 32, 32)),
        "resnet20.untrained": _config("stem.conv", input_size=(3, 32, 32)),
        "shufflenet_v2.untrained": _config("conv1.0"),
    }
)
_build: Callable[..., nn.Module] = build_model_with_cfg


def _swin(name: str, embed_dim: int, pretrained: bool, options: dict[str, object]) -> nn.Module:
    defaults: dict[str, object] = {
        "embed_dim": embed_dim,
        "patch_size": 4,
        "window_size": 7,
        "depths": (2, 2, 2, 2),
        "num_heads": (2, 4, 8, 16),
    }
    return _build(SwinTransformer, name, pretrained, **(defaults | options))


@register_model
def swin_pico(pretrained: bool = False, **options: object) -> nn.Module:
    """Swin-P: 48-96-192-384 channels."""
    return _swin("swin_pico", 48, pretrained, options)


@register_model
def swin_nano(pretrained: bool = False, **options: object) -> nn.Module:
    """Swin-N: 64-128-256-512 channels."""
    return _swin("swin_nano", 64, pretrained, options)


@register_model
def vgg8(pretrained: bool = False, **options: object) -> nn.Module:
    """See `VGG8`."""
    return _build(VGG8, "vgg8", pretrained, kwargs_filter=("in_chans",), **options)


@register_model
def resnet20(pretrained: bool = False, **options: object) -> nn.Module:
    """See `ResNet20`."""
    return _build(ResNet20, "resnet20", pretrained, kwargs_filter=("in_chans",), **options)


@register_model
def shufflenet_v2(pretrained: bool = False, **options: object) -> nn.Module:
    """See `ShuffleNetV2`."""
    return _build(ShuffleNetV2, "shufflenet_v2", pretrained, kwargs_filter=("in_chans",), **options)
