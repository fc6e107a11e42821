"""A small network of each of timm's model modules, and the page docs/networks.md that says what each gives.

python -m heterokd.networks.families > docs/networks.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from heterokd.networks.network import predict_spec
from heterokd.outputs import OutputSpec, Signal


@dataclass(frozen=True)
class Family:
    """A small network of a module.

    Attributes:
        network: timm's name.
        image_size: smallest size at which it is tried, in pixels.
        options: options that make it smaller.
    """

    network: str
    image_size: int
    options: Mapping[str, object] = field(default_factory=dict)

    def spec(self, num_classes: int = 5) -> OutputSpec:
        """Return its outputs."""
        return predict_spec(self.network, num_classes, self.options, self.image_size)


FAMILIES = {
    "beit": Family("beit_base_patch16_224", 64, {"depth": 4, "embed_dim": 192, "num_heads": 3}),
    "byoanet": Family("halonet26t", 256),
    "byobnet": Family("repvgg_a0", 64),
    "cait": Family("cait_xxs24_224", 64, {"depth": 4}),
    "coat": Family("coat_tiny", 64),
    "convit": Family("convit_tiny", 64),
    "convmixer": Family("convmixer_768_32", 64, {"depth": 4}),
    "convnext": Family("test_convnext", 64),
    "cpubone": Family("cpubone_nano", 64),
    "crossvit": Family("crossvit_tiny_240", 240),
    "csatv2": Family("csatv2", 256),
    "cspnet": Family("cs3darknet_s", 64),
    "cspnext": Family("cspnext_tiny", 64),
    "davit": Family("davit_tiny", 64, {"depths": [1, 1, 1, 1]}),
    "deepseek_vit": Family("deepseek_vit_412m", 56, {"depth": 4}),
    "deit": Family("deit_tiny_patch16_224", 64, {"depth": 4}),
    "densenet": Family("densenet121", 64),
    "dla": Family("dla46_c", 64),
    "dpn": Family("dpn48b", 64),
    "edgenext": Family("edgenext_xx_small", 64),
    "efficientformer": Family("efficientformer_l1", 224),
    "efficientformer_v2": Family("efficientformerv2_s0", 64),
    "efficientnet": Family("test_efficientnet", 64),
    "efficientvim": Family("efficientvim_m1", 64),
    "efficientvit_mit": Family("efficientvit_b0", 64),
    "efficientvit_msra": Family("efficientvit_m0", 64),
    "eva": Family("eva02_tiny_patch14_224", 56, {"depth": 4}),
    "fasternet": Family("fasternet_t0", 64),
    "fastvit": Family("fastvit_t8", 64),
    "focalnet": Family("focalnet_tiny_srf", 64),
    "gcvit": Family("gcvit_xxtiny", 64),
    "gemma4_vit": Family("gemma4_vit_167m", 96, {"depth": 4}),
    "ghostnet": Family("ghostnet_050", 64),
    "hardcorenas": Family("hardcorenas_a", 64),
    "hgnet": Family("hgnetv2_b0", 64),
    "hiera": Family("hiera_tiny_224", 64, {"stages": [1, 1, 2, 1]}),
    "hieradet_sam2": Family("sam2_hiera_tiny", 64),
    "hrnet": Family("hrnet_w18_small", 64),
    "iformer": Family("iformer_t", 64),
    "inception_next": Family("inception_next_atto", 64),
    "inception_resnet_v2": Family("inception_resnet_v2", 96),
    "inception_v3": Family("inception_v3", 96),
    "inception_v4": Family("inception_v4", 96),
    "lcnetv2": Family("lcnetv2_small", 64),
    "levit": Family("levit_128s", 64),
    "lowformer": Family("lowformer_b0", 64),
    "mambaout": Family("test_mambaout", 64),
    "maxxvit": Family("test_maxvit", 160),
    "metaformer": Family("poolformer_s12", 64),
    "mlp_mixer": Family("gmlp_ti16_224", 64, {"num_blocks": 4}),
    "mobilenetv3": Family("lcnet_050", 64),
    "mobilenetv5": Family("mobilenetv5_300m", 64, {"channel_multiplier": 0.1}),
    "mobilevit": Family("mobilevit_xxs", 64),
    "mvitv2": Family("mvitv2_tiny", 64),
    "naflexvit": Family("naflexvit_base_patch16_gap", 64, {"depth": 4, "embed_dim": 192, "num_heads": 3}),
    "nasnet": Family("nasnetalarge", 96),
    "nest": Family("nest_tiny", 224, {"depths": [1, 1, 2]}),
    "nextvit": Family("nextvit_small", 64),
    "nfnet": Family("nfnet_l0", 64),
    "pit": Family("pit_ti_224", 224),
    "pnasnet": Family("pnasnet5large", 96),
    "pvt_v2": Family("pvt_v2_b0", 64),
    "qwen3_vit": Family("qwen3_vit_88m", 64, {"depth": 4}),
    "rdnet": Family("rdnet_tiny", 64),
    "regnet": Family("regnetx_002", 64),
    "repghost": Family("repghostnet_050", 64),
    "repvit": Family("repvit_m0_9", 64),
    "res2net": Family("res2net50d", 64, {"layers": [1, 1, 1, 1]}),
    "resnest": Family("resnest14d", 64),
    "resnet": Family("test_resnet", 64),
    "resnetv2": Family("resnetv2_18", 64),
    "rexnet": Family("rexnet_100", 64),
    "selecsls": Family("selecsls42", 64),
    "senet": Family("legacy_seresnet18", 64),
    "sequencer": Family("sequencer2d_s", 224, {"layers": [1, 1, 1, 1]}),
    "shvit": Family("shvit_s1", 64),
    "sknet": Family("skresnet18", 64),
    "starnet": Family("starnet_s050", 64),
    "swiftformer": Family("swiftformer_xs", 64),
    "swin_transformer": Family("swin_pico", 64, {"window_size": 4}),
    "swin_transformer_v2": Family(
        "swinv2_tiny_window8_256", 64, {"window_size": 4, "depths": [1, 1, 1, 1], "embed_dim": 48}
    ),
    "swin_transformer_v2_cr": Family("swinv2_cr_tiny_ns_224", 224, {"depths": [1, 1, 1, 1]}),
    "tiny_vit": Family("tiny_vit_5m_224", 64),
    "tnt": Family("tnt_s_legacy_patch16_224", 64, {"depth": 4}),
    "tresnet": Family("tresnet_m", 64),
    "twins": Family("twins_svt_small", 64, {"depths": [1, 1, 2, 1]}),
    "vgg": Family("vgg11", 64, {"mlp_ratio": 0.05}),
    "visformer": Family("visformer_tiny", 64),
    "vision_transformer": Family("test_vit", 64),
    "vision_transformer_hybrid": Family("vit_tiny_r_s16_p8_224", 64, {"depth": 4}),
    "vision_transformer_relpos": Family("test_vit_relpos", 64),
    "vision_transformer_sam": Family("samvit_base_patch16_224", 64, {"depth": 4}),
    "vitamin": Family("vitamin_small_224", 64),
    "volo": Family("volo_d1_224", 64),
    "vovnet": Family("ese_vovnet19b_slim", 64),
    "xception": Family("legacy_xception", 96),
    "xception_aligned": Family("xception41", 96),
    "xcit": Family("xcit_nano_12_p8_224", 64, {"depth": 4}),
}


INTRODUCTION = """\
# Networks

`teacher.network` and `student.network` name a network, or a list of networks to search:

| name | network |
|---|---|
| `resnet18`, `vit_tiny_patch16_224.augreg_in21k` | any classifier of timm; `options` are its arguments |
| `hf-hub:timm/resnet18.a1_in1k` | the same by its name on the hub |
| `torchvision:mobilenet_v3_small` | a classifier of torchvision |
| `./nets.py:make_student` | your function or class in a file |
| `package.module:callable` | a function or class of an installed package |
| `segformer-mit_b0` | a segmentation network, see [segmentation](segmentation.md) |

`options: {in_chans: 1}` makes a network for grey images. Images are read in colour, and converted to grey before the
network.

## What a network gives

Methods read signals (`heterokd.outputs.Signal`). Logits and embedding (the input of the last classifier) come from
every classifier, four stages from networks with maps inside, the tail (the network from a stage to its logits) from
networks that can be run from each stage on. A method that reads a signal that a network does not give is left out of
`methods: all`; `heterokd plan` and the page say which and why. If an experiment names the method, it is refused.

Stages are found in the network's dataflow: outputs of modules that everything behind them depends on. Of more than four
resolutions the last four are stages, of fewer the longest are divided, and equal blocks are divided 2-2-6-2 of twelve.
Where branches run next to each other, stages are maps of timm's `forward_intermediates`, and there is no tail.

## Your module

Any `torch.nn.Module` that maps images [B, 3, H, W] to logits [B, K], or to an object with the attribute `logits`, is
a teacher or a student. Write `nets.py`:

```python
from torch import nn


def make_student(num_classes: int, width: int = 16) -> nn.Module:
    channels = [3, width, 2 * width, 3 * width, 4 * width]
    stages = [
        nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
        for before, after in zip(channels, channels[1:])
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))
```

and name it, with its arguments as `options`:

```text
student:
  network: ./nets.py:make_student
  options: {width: 8}
  taps: {stages: ["0", "1", "2", "3"], embedding: "5"}    # may be left out
```

`num_classes` comes from the data set, `img_size` from `data.image_size` if the function has this parameter. `taps`
names the four modules whose outputs are the stages, and the module whose output is the embedding; without it both are
looked for. In a list of networks, `taps` is an option of a network: `options: {resnet18: {taps: ...}}`.

The settings hold the text of the file (`options.module` in experiment.yaml), so that recipes, exports and the nodes of
a cluster have it; the file cannot import other files next to it. A package must be installed on every node.

Images are normalised with ImageNet's mean and deviation, or those of the module's attribute `pretrained_cfg`
(`{"mean": ..., "std": ...}`). Weights come from `teacher.checkpoint`, or the function loads them.

An image classifier of Hugging Face's transformers, if that is installed (the tests run this block only then):

```python
# nets.py
from transformers import AutoConfig, AutoModelForImageClassification


def make_teacher(num_classes: int, config: str):
    return AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(config, num_labels=num_classes))
```

with `network: ./nets.py:make_teacher`, `options: {config: FOLDER}` and `teacher.checkpoint` of its weights.

A module that gives a map of logits is a segmentation network: [segmentation](segmentation.md#your-own-module).

## timm's families

A small network of each of timm's model modules, written by `python -m heterokd.networks.families` (`make docs`).
"""


def networks_page() -> str:
    """Return docs/networks.md."""
    specs = {module: family.spec() for module, family in FAMILIES.items()}
    stages, tails = (sum(signal in spec.serves for spec in specs.values()) for signal in (Signal.STAGES, Signal.TAIL))
    rows = [
        f"| `{module}` | `{FAMILIES[module].network}` | {spec.kind} | {_maps(spec)} | "
        f"{'yes' if Signal.TAIL in spec.serves else 'no'} |"
        for module, spec in specs.items()
    ]
    counts = (
        f"All {len(specs)} give logits and embedding, {stages} stages, {tails} a tail. A stage is its channels x the "
        "side of its map, at the image size in brackets."
    )
    return "\n".join(
        [INTRODUCTION, counts, "", "| module | network | kind | stages | tail |", "|---|---|---|---|---|", *rows, ""]
    )


def _maps(spec: OutputSpec) -> str:
    if not spec.stages:
        return "no"
    maps = ", ".join(f"{stage.channels} x {spec.side(number)}" for number, stage in enumerate(spec.stages, start=1))
    return f"{maps} ({spec.image_size})"


if __name__ == "__main__":
    print(networks_page(), end="")
