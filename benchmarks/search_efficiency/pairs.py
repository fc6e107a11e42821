"""The three questions: which student learns how from which teacher; each with every configuration that may be asked.

The search sees a question as a real `Experiment`, whose search space is narrowed to a few options a parameter, so that
all combinations can be trained beforehand. Its networks are timm's relatives of the tiny ones: nothing builds them, but
the papers' rankings are looked up by their kinds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.search_efficiency.networks import CNN, MLP, Mixer, Network, ViT
from heterokd.config.experiment import Experiment
from heterokd.domains import Choice, Scalar
from heterokd.methods import BASELINE

EPOCHS = 27
"""Rungs a factor of 3 apart come out even: 3, 9, 27."""

METHODS = (BASELINE, "kd", "dkd", "dist", "ofa", "hcd", "fbt", "fitnet")

OPTIONS: dict[str, dict[str, list[Scalar]]] = {
    BASELINE: {},
    "kd": {"temperature": [1.0, 2.0, 4.0, 8.0], "weight": [0.3, 1.0, 3.0, 10.0]},
    "dkd": {
        "target_weight": [0.5, 2.0],
        "non_target_weight": [1.0, 2.0, 4.0, 8.0],
        "temperature": [1.0, 2.0, 4.0, 8.0],
        "warmup": [0.1],
    },
    "dist": {
        "inter_weight": [0.3, 1.0, 3.0],
        "intra_weight": [0.3, 1.0, 3.0],
        "temperature": [1.0, 2.0, 4.0],
    },
    "ofa": {
        "eps": [1.0, 1.2, 1.4, 1.6],
        "stage_weight": [0.1, 1.0],
        "stages": ["1234", "234", "34", "4"],
    },
    "hcd": {
        "num_sublogits": [1, 2, 4, 6],
        "sub_kl_weight": [1.0, 3.0, 10.0],
        "orthogonality_weight": [8.0],
        "temperature": [1.0, 4.0],
        "detach_sublogits": [False],
    },
    "fbt": {
        "front_stage": [1, 2, 3],
        "back_stage": [3, 4, 5],
        "gamma": [1.0],
        "infonce_weight": [0.1, 1.0],
        "task_loss": [True],  # as in the trainings of the tables
        "detach_fused": [True],
    },
    "fitnet": {"weight": [0.1, 1.0, 10.0, 100.0], "stages": ["1234", "234", "34", "4"]},
}
"""What is asked of each method: its own parameters, their whole domain where it is a list, a few values of it else."""

LEARNING_RATES: list[Scalar] = [0.005, 0.02, 0.1, 0.5]
"""All that `search_spaces/quickstart.yaml` asks, since nobody knows beforehand what is too much."""

Config = dict[str, Scalar]


@dataclass(frozen=True)
class Pair:
    """One table's question.

    Attributes:
        name: of its files.
        title: for people.
        teacher: the tiny network that is followed.
        student: the tiny network that is trained.
        relatives: networks of timm of the same kinds, teacher's and student's.
    """

    name: str
    title: str
    teacher: Network
    student: Network
    relatives: tuple[str, str]

    def experiment(self, search: Mapping[str, Any] | None = None) -> Experiment:
        """The question as a search sees it.

        Args:
            search: settings of the search in place of the defaults.
        """
        overrides = {f"{m}.{name}": {"options": values} for m in METHODS for name, values in OPTIONS[m].items()}
        space = {
            "methods": METHODS,
            "shared": {"training.learning_rate": {"options": LEARNING_RATES}},
            "overrides": overrides,
        }
        return Experiment.model_validate(
            {
                "name": self.name,
                "data": {"dataset": "digits", "image_size": 32},
                "teacher": {"network": self.relatives[0]},
                "student": {"network": self.relatives[1]},
                "training": {"epochs": EPOCHS, "learning_rate": 0.05, "clip_grad": 5.0, "batch_size": 20},
                "search": {"metric": "val/top1", **(search or {}), "space": space},
            }
        )

    def configs(self) -> list[Config]:
        """Every sample that the experiment's space holds, method by method."""
        experiment, found = self.experiment(), []
        for method in experiment.methods:
            domains = experiment.method_domains(method) | experiment.shared_domains()
            options = [domain.options for domain in domains.values() if isinstance(domain, Choice)]
            assert len(options) == len(domains), f"{method}: a domain is not a list of options"
            for values in itertools.product(*options):
                found.append({"method": method, **dict(zip(domains, values, strict=True))})
        return found


_CNN_TEACHER = CNN((12, 16, 20, 24), (4, 4, 2, 2), "cnn")
_VIT_TEACHER = ViT((24, 24, 24, 24), (2, 2, 2, 2), "attention")

PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            "cnn_mlp",
            "CNN to MLP",
            _CNN_TEACHER,
            MLP((24, 24, 24, 24), (1, 1, 1, 1), "mlp"),
            ("resnet50", "resmlp_12_224"),
        ),
        Pair(
            "vit_cnn",
            "tiny ViT to CNN",
            _VIT_TEACHER,
            CNN((4, 8, 8, 12), (4, 2, 2, 2), "cnn"),
            ("vit_small_patch16_224", "resnet18"),
        ),
        Pair(
            "cnn_mixer",
            "CNN to MLP-Mixer",
            _CNN_TEACHER,
            Mixer((8, 8, 8, 8), (2, 2, 2, 2), "mlp"),
            ("resnet50", "mixer_b16_224"),
        ),
    )
}
