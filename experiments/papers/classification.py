"""Experiments of the pairs of FBT and HCD: classification.

The schedules come from the papers and from the program that they follow, OFA-KD (github.com/Hao840/OFAKD); each file
lists the deviations of heterokd.
"""

from __future__ import annotations

from layout import WIDTH, comment, deviations, flow, published_table, teacher_head

from heterokd.methods import METHODS
from heterokd.study.published import PublishedPair, published_pairs

SHORT = {
    "swin_tiny_patch4_window7_224": "swin_tiny",
    "vit_small_patch16_224": "vit_small",
    "mixer_b16_224": "mixer_b16",
    "deit_tiny_patch16_224": "deit_tiny",
    "resmlp_12_224": "resmlp_12",
    "mobilenetv1_100": "mobilenetv1",
    "mobilenetv2_100": "mobilenetv2",
    "vit_base_patch16_siglip_224": "siglip2_base",
    "vit_large_patch16_siglip_256": "siglip2_large",
    "vit_small_patch14_dinov2": "dinov2_small",
    "vit_large_patch14_dinov2": "dinov2_large",
}
# The weights of timm that reach the accuracies of the tables on ImageNet.
TAGS = {
    "swin_tiny_patch4_window7_224": "ms_in1k",
    "vit_small_patch16_224": "augreg_in21k_ft_in1k",
    "mixer_b16_224": "goog_in21k_ft_in1k",
    "convnext_tiny": "fb_in1k",
    "deit_tiny_patch16_224": "fb_in1k",
    "resnet34": "tv_in1k",
    "resnet50": "a1_in1k",
    "vit_base_patch16_siglip_224": "v2_webli",
    "vit_large_patch16_siglip_256": "v2_webli",
    "vit_small_patch14_dinov2": "lvd142m",
    "vit_large_patch14_dinov2": "lvd142m",
}
OPTIONS = {"vit_large_patch16_siglip_256": "{img_size: 256}"}  # the size of its weights; DINOv2's patches divide 224
FINE_GRAINED = ("cub200", "fgvc_aircraft")


def is_homogeneous(pair: PublishedPair) -> bool:
    """Whether the pair is a CNN pair of ImageNet, which have another schedule."""
    return pair.dataset == "imagenet" and pair.teacher_kind == pair.student_kind == "cnn"


def training(pair: PublishedPair) -> tuple[str, list[str]]:
    """Return the student's schedule and its deviations from the published schedule."""
    if pair.dataset in FINE_GRAINED:
        # CRD's program uses a fifth of the learning rate for these networks.
        rate = 0.01 if pair.student in ("mobilenetv2_100", "shufflenet_v2") else 0.05
        return (
            f"{{epochs: 240, batch_size: 64, optimizer: sgd, learning_rate: {rate}, weight_decay: 5e-4}}",
            [
                "the learning rate follows a cosine; CRD's schedule divides it by ten at epochs 150, 180 and 210",
                "HCD does not give the image size; here it is 224 pixels for students and teachers",
            ],
        )
    if pair.dataset == "cifar100" and pair.student_kind == "cnn":
        return (
            "{epochs: 300, batch_size: 1024, optimizer: sgd, learning_rate: 0.05, min_learning_rate: 1e-3, "
            "weight_decay: 2e-3, warmup_epochs: 3, label_smoothing: 0.1}",
            ["batch 1024 is 8 GPUs of 128 images; with a smaller batch, reduce the learning rate in proportion"],
        )
    if pair.dataset == "cifar100":
        return (
            "{epochs: 300, batch_size: 1024, optimizer: adamw, learning_rate: 5e-4, min_learning_rate: 1e-5, "
            "weight_decay: 0.05, warmup_epochs: 20, label_smoothing: 0.1, clip_grad: 5.0}",
            ["batch 1024 is 8 GPUs of 128 images; with a smaller batch, reduce the learning rate in proportion"],
        )
    if is_homogeneous(pair):
        return (
            "{epochs: 100, batch_size: 256, optimizer: sgd, learning_rate: 0.1, weight_decay: 1e-4, "
            "schedule: step, warmup_epochs: 10}",
            [
                "steps divide the epochs after the warm-up, at 37, 64 and 91; HCD's are at 30, 60 and 90",
                "FBT's schedule is OFA-KD's, with batch 512 and 3 epochs of warm-up",
            ],
        )
    if pair.student_kind == "cnn":
        return (
            "{epochs: 100, batch_size: 512, optimizer: sgd, learning_rate: 0.1, weight_decay: 1e-4, "
            "schedule: step, warmup_epochs: 3}",
            ["steps divide the epochs after the warm-up, at 32, 61 and 90; OFA-KD's are 30 epochs apart"],
        )
    return (
        "{epochs: 300, batch_size: 1024, optimizer: adamw, learning_rate: 5e-4, min_learning_rate: 1e-5, "
        "weight_decay: 0.05, warmup_epochs: 20, label_smoothing: 0.1, clip_grad: 5.0, ema: 0.99996}",
        [],
    )


def teacher_training(pair: PublishedPair) -> tuple[str | None, list[str]]:
    """How the teacher is fitted to the data set, and where that deviates; None where timm's weights answer already."""
    if pair.dataset == "imagenet":
        return None, []
    if pair.dataset == "cifar100":
        return (
            "{epochs: 300, batch_size: 1024, optimizer: adamw, learning_rate: 5e-5, min_learning_rate: 1e-6, "
            "weight_decay: 0.05, warmup_epochs: 20, label_smoothing: 0.1, clip_grad: 5.0}",
            []
            if augment(pair) == "ofa"
            else [
                "fitted with this file, the teacher sees the student's views; OFA-KD's teacher sees RandAugment, mixup "
                "and cutmix, as in the teacher's file"
            ],
        )
    return (
        "{epochs: 20, batch_size: 128, optimizer: sgd, learning_rate: 0.1, weight_decay: 0.0, warmup_epochs: 0, "
        "label_smoothing: 0.0, trainable: head}",
        ["HCD gives 20 epochs, batch 128 and learning rate 0.1 for the teacher's classifier; the rest is a guess"],
    )


def methods_of(pair: PublishedPair) -> list[str]:
    """The table's methods that heterokd has, scratch first."""
    return ["scratch", *(method for method in METHODS if method != "scratch" and pair.of(method) is not None)]


def network(pair: PublishedPair) -> str:
    """The teacher in timm, with the tag of its weights."""
    tag = "tv_in1k" if is_homogeneous(pair) else TAGS[pair.teacher]
    return f"{pair.teacher}.{tag}"


def name(pair: PublishedPair) -> str:
    """Of the experiment and its file."""
    return "_".join((pair.dataset, *(SHORT.get(one, one) for one in (pair.teacher, pair.student))))


def augment(pair: PublishedPair) -> str:
    """The policy of the views: OFA-KD crops and flips alone for CNNs; others see RandAugment, mixup and cutmix too."""
    return "crop" if pair.student_kind == "cnn" or pair.dataset in FINE_GRAINED else "ofa"


def data_lines(pair: PublishedPair, policy: str) -> list[str]:
    """The data section."""
    settings = f"{{dataset: {pair.dataset}, root: data/{pair.dataset}, image_size: 224, augment: {policy}}}"
    return flow("data", settings)


def teacher_lines(pair: PublishedPair) -> list[str]:
    """The teacher section."""
    fitted, _ = teacher_training(pair)
    lines = ["teacher:", f"  network: {network(pair)}", "  pretrained: true"]
    if pair.teacher in OPTIONS:
        lines.append(f"  options: {OPTIONS[pair.teacher]}")
    if fitted is not None:
        lines += ["  " + line for line in flow("training", fitted, WIDTH - 2)]
    return lines


def pair_file(pair: PublishedPair) -> str:
    """Return the experiment of a pair."""
    student, differences = training(pair)
    found = methods_of(pair)
    missing = [method for method in pair.methods if method not in METHODS]
    lines = [f"# {pair.teacher_name} to {pair.student_name} on {pair.dataset}."]
    lines += published_table(pair)
    if missing:
        lines += comment(f"Not in heterokd: {', '.join(missing)}.")
    lines.append("#")
    lines += deviations(
        [*differences, *teacher_training(pair)[1], "numbers are measured on val, published ones on test"]
    )
    lines.append("#")
    lines += comment("heterokd reproduce trains the published settings; heterokd search starts from them.")
    if pair.dataset != "imagenet":
        lines += comment(f"The teacher of all its students: teachers/{teacher_name(pair)}.yaml.")
    lines += [f"name: {name(pair)}", *data_lines(pair, augment(pair)), *teacher_lines(pair)]
    lines += [f"student: {{network: {pair.student}}}", *flow("training", student)]
    lines += [
        "search:",
        "  space:",
        *("    " + line for line in flow("methods", f"[{', '.join(found)}]", WIDTH - 4)),
        "    shared: {training.task_weight: {options: [0.1, 0.5, 1.0]}}",
        f"  trials: {3 * len(found)}",
        f"tracking: {{experiment: papers-{pair.dataset}}}",
    ]
    return "\n".join(lines) + "\n"


def teacher_name(pair: PublishedPair) -> str:
    """Return the name of a teacher's experiment."""
    return f"{pair.dataset}_{SHORT.get(pair.teacher, pair.teacher)}"


def teacher_file(pair: PublishedPair) -> str:
    """Return the experiment that fits a teacher, with the first of its students."""
    file = f"teachers/{teacher_name(pair)}.yaml"
    lines = teacher_head(f"{pair.teacher_name} for {pair.dataset}: {pair.teacher_value:.2f} % top-1 published.", file)
    # On CIFAR-100, OFA-KD's teachers see the views of transformers, for every student.
    policy = "ofa" if pair.dataset == "cifar100" else "crop"
    lines = lines[:-1] if policy == "ofa" else [*lines, *deviations(teacher_training(pair)[1])]
    lines += [f"name: teacher_{teacher_name(pair)}"]
    lines += [*data_lines(pair, policy), *teacher_lines(pair), f"student: {{network: {pair.student}}}"]
    lines += [*flow("training", training(pair)[0]), "search: {space: {methods: [scratch]}, trials: 1}"]
    return "\n".join(lines) + "\n"


def files() -> dict[str, str]:
    """Return the text of every file by its path in this folder."""
    pairs = [pair for pair in published_pairs() if pair.metric == "top1"]
    written = {f"{name(pair)}.yaml": pair_file(pair) for pair in pairs}
    for pair in pairs:
        if pair.dataset != "imagenet":
            written.setdefault(f"teachers/{teacher_name(pair)}.yaml", teacher_file(pair))
    return written
