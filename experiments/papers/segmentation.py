"""Experiments of the pairs of HeteroAKD and CIRKD: segmentation.

HeteroAKD's authors ran every method in CIRKD's program (github.com/winycg/CIRKD) and Af-DCD's; which of its schedules
belongs to which pair is not known, so the schedules here are those of CIRKD's scripts. What heterokd cannot do
alike, and what is a guess, is said in each file.
"""

from __future__ import annotations

from dataclasses import dataclass

from layout import comment, deviations, flow, published_table, teacher_head

from heterokd.datasets import ade20k, cityscapes, voc2012
from heterokd.study.published import PublishedPair, published_pairs

IMAGES = {"cityscapes": 2975, "voc2012": 10582, "ade20k": 20210}
"""Training images of the sets."""

VAL_SHARES = {"cityscapes": cityscapes.VAL_SHARE, "voc2012": voc2012.VAL_SHARE, "ade20k": ade20k.VAL_SHARE}
"""What of them heterokd keeps for val: Cityscapes' is at most that, made of whole cities."""

TITLES = {"cityscapes": "Cityscapes", "voc2012": "PASCAL VOC 2012 (augmented)", "ade20k": "ADE20K"}

UNPRINTED = PublishedPair(
    dataset="voc2012",
    teacher="deeplabv3-resnet101",
    student="segformer-mit_b0",
    teacher_name="A CNN (taken for DeepLabV3-Res101)",
    student_name="a Transformer (taken for SegFormer-MiT-B0)",
    teacher_kind="cnn",
    student_kind="attention",
    teacher_value=77.67,
    results=(),
)
"""HeteroAKD's pair on PASCAL VOC 2012, of which nobody quotes a number; the teacher's is of CIRKD's README."""


@dataclass(frozen=True)
class Schedule:
    """One training of CIRKD's program.

    Attributes:
        iterations: optimizer updates.
        batch: images of each.
        optimizer: with its learning rate and weight decay, as training keys.
        crop: height and width of the views.
    """

    iterations: int
    batch: int
    optimizer: str
    crop: tuple[int, int]

    def epochs(self, dataset: str) -> int:
        """The nearest number of passes over the images that train here, without their last smaller batch."""
        return round(self.iterations / (self.images(dataset) // self.batch))

    def images(self, dataset: str) -> int:
        """How many train here."""
        return round(IMAGES[dataset] * (1 - VAL_SHARES[dataset]))

    def training(self, dataset: str, network: str) -> str:
        """The training keys of a network; `momentum` is left out, heterokd's default is CIRKD's 0.9."""
        auxiliary = ", auxiliary_weight: 0.4" if "resnet" in network else ""
        return f"epochs: {self.epochs(dataset)}, batch_size: {self.batch}, {self.optimizer}, schedule: poly{auxiliary}"

    def said(self, dataset: str) -> str:
        """The conversion in words."""
        return (
            f"{self.iterations:,} iterations of {self.batch} images are {self.epochs(dataset)} epochs of the "
            f"{self.images(dataset):,} images that are left of {IMAGES[dataset]:,} when {VAL_SHARES[dataset]:.0%} "
            "are kept for val"
        )


SGD = "optimizer: sgd, learning_rate: 0.02, weight_decay: 1e-4"
ADAMW = "optimizer: adamw, learning_rate: 2e-4, weight_decay: 1e-4"


def schedule(pair: PublishedPair, network: str) -> Schedule:
    """How one of a pair's networks is trained."""
    if is_transformer_pair(pair):
        return Schedule(160_000, 8, ADAMW, (1024, 1024))
    crop = (512, 1024) if pair.dataset == "cityscapes" else (512, 512)
    return Schedule(40_000, 16, ADAMW if "mit_" in network else SGD, crop)


def is_transformer_pair(pair: PublishedPair) -> bool:
    """Whether it is SegFormer to SegFormer, which CIRKD's program trains differently."""
    return pair.teacher_kind == pair.student_kind == "attention"


def guesses(pair: PublishedPair, network: str) -> list[str]:
    """What of a network's training no source says."""
    if "mit_" not in network or is_transformer_pair(pair):
        return []
    return [
        f"{network} is trained with the optimizer of CIRKD's SegFormers, on views, batches and iterations of its CNNs: "
        "how HeteroAKD trains its Transformers is not known"
    ]


def differences(pair: PublishedPair, *networks: str) -> list[str]:
    """Where the training of these networks deviates from the published one."""
    found = [schedule(pair, networks[0]).said(pair.dataset)]
    if pair.dataset != "cityscapes":
        found.append("CIRKD's scripts of 2022 train 40,000 iterations on this data set, those of CIRKDv2 80,000")
    for network in networks:
        found += guesses(pair, network)
    if any(network.startswith("deeplabv3-mit_") for network in networks):
        found.append("MiT cannot be dilated, so DeepLabV3's maps on it have stride 32; HeteroAKD's stride is not known")
    if any("deeplabv3" in network for network in networks):
        found.append("256 channels enter DeepLabV3's classifier; CIRKD's program has 512")
    found.append("norms and biases have no weight decay; in CIRKD they have")
    if is_transformer_pair(pair):
        found.append("windows of an evaluation overlap by a third; CIRKD's program cuts an image into two halves")
    return found


def short(network: str) -> str:
    """A network in a file's name; DeepLabV3 goes without saying."""
    return network.removeprefix("deeplabv3-").replace("-", "_")


def name(pair: PublishedPair) -> str:
    """Of the experiment and its file; the paper is HeteroAKD where it has the pair."""
    is_heteroakd = pair == UNPRINTED or pair.of("heteroakd") is not None
    paper = "heteroakd" if is_heteroakd else "cirkd"
    return "_".join((paper, pair.dataset, short(pair.teacher), short(pair.student)))


def data_lines(pair: PublishedPair) -> list[str]:
    """The data section."""
    height, width = schedule(pair, pair.student).crop
    size = 1024 if pair.dataset == "cityscapes" else 512
    sliding = ", evaluation: sliding" if is_transformer_pair(pair) else ""
    return flow(
        "data",
        f"{{dataset: {pair.dataset}, root: data/{pair.dataset}, image_size: {size}, crop: [{height}, {width}], "
        f"augment: scenes{sliding}}}",
    )


def network_lines(pair: PublishedPair) -> list[str]:
    """The teacher, the student and its training."""
    fitted = schedule(pair, pair.teacher).training(pair.dataset, pair.teacher)
    return [
        "teacher:",
        f"  network: {pair.teacher}",
        "  pretrained: true",
        *("  " + line for line in flow("training", f"{{{fitted}, warmup_epochs: 0, label_smoothing: 0.0}}", 118)),
        f"student: {{network: {pair.student}, pretrained: true}}",
        *flow("training", f"{{{schedule(pair, pair.student).training(pair.dataset, pair.student)}}}"),
    ]


def pair_file(pair: PublishedPair) -> str:
    """The experiment of a pair."""
    lines = [f"# {pair.teacher_name} to {pair.student_name} on {TITLES[pair.dataset]}."]
    if pair.results:
        lines += published_table(pair)
        for note in pair.notes:
            lines += comment(note)
    else:
        lines += comment(
            "HeteroAKD (arXiv 2504.07691) has pairs on this data set, but its numbers are not quoted anywhere. "
            f"The README of github.com/winycg/CIRKD has {pair.teacher_value:.2f} mIoU for this teacher."
        )
    if "taken for" in pair.student_name:
        lines += comment(
            "Which networks they are is not known either: these are the likeliest of those in CIRKD's program."
        )
    texts = differences(pair, pair.teacher, pair.student)
    lines += ["#", *deviations([*texts, "numbers are measured on val, published ones on what is test here"]), "#"]
    if pair.results:
        lines += comment("heterokd reproduce trains the published settings; heterokd search starts from them.")
    else:
        lines += comment("heterokd reproduce trains every method's published settings.")
    lines += comment(f"The teacher of all its students: teachers/{teacher_name(pair)}.yaml.")
    lines += [f"name: {name(pair)}", *data_lines(pair), *network_lines(pair)]
    lines += [
        "search: {space: search_spaces/segmentation.yaml, trials: 36}",
        f"tracking: {{experiment: papers-{pair.dataset}}}",
    ]
    return "\n".join(lines) + "\n"


def teacher_name(pair: PublishedPair) -> str:
    """Return the name of a teacher's experiment."""
    return f"{pair.dataset}_{short(pair.teacher)}"


def teacher_file(pair: PublishedPair) -> str:
    """The experiment that fits a teacher, with the first of its students."""
    lines = teacher_head(
        f"{pair.teacher_name} for {TITLES[pair.dataset]}: {pair.teacher_value:.2f} % mIoU published.",
        f"teachers/{teacher_name(pair)}.yaml",
    )
    lines += deviations(differences(pair, pair.teacher))
    lines += [f"name: teacher_{teacher_name(pair)}", *data_lines(pair), *network_lines(pair)]
    lines += ["search: {space: {methods: [scratch]}, trials: 1}"]
    return "\n".join(lines) + "\n"


def files() -> dict[str, str]:
    """Every file by its path in this folder, with its text."""
    pairs = [*(pair for pair in published_pairs() if pair.metric == "miou"), UNPRINTED]
    written = {f"{name(pair)}.yaml": pair_file(pair) for pair in pairs}
    for pair in pairs:
        if pair.teacher_value is not None:
            written.setdefault(f"teachers/{teacher_name(pair)}.yaml", teacher_file(pair))
    return written
