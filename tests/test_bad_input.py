"""Everything a user can get wrong, through the command line: exit code 2, a sentence that says where, no work begun."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Run
from PIL import Image
from tiny_datasets import TINY as DATA_SETS
from tiny_datasets import write_classes

import heterokd.cli.cache_build
import heterokd.datasets
import heterokd.execution.auto
import heterokd.execution.distill
import heterokd.execution.driver
import heterokd.execution.match
import heterokd.execution.planning.measure_costs
import heterokd.execution.reproduce
import heterokd.training.data
from benchmarks.bad_input_cases import BadInput, all_cases
from benchmarks.bad_inputs import fault_of
from heterokd.networks.network import build_network
from heterokd.networks.weights import save_weights

Make = Callable[[Path], None]

# Values that reading alone refuses: the sentence begins with the very text.
REFUSED_VALUES = """
training.epochs=0 | training.epochs=-3 | training.epochs=1.5 | training.epochs='3' | training.epochs=null
training.epochs=[3] | training.epochs=1e400 | training.epochs=.nan | training.epochs=100001 | training.epochs=ten
training.batch_size=0 | training.batch_size=-5 | training.batch_size=1000001 | training.learning_rate=.nan
training.learning_rate=-.inf | training.learning_rate=1e-3x | training.learning_rate=-0.1 | training.momentum=-1
training.momentum=2 | training.weight_decay=-1 | training.label_smoothing=1 | training.clip_grad=0 | training.ema=1.0
training.ema=0 | training.precision=fp8 | training.channels_last=yes please | training.accumulate=0
training.compile=1 | training.trainable=body | training.workers=0 | training.seed=-1 | training.seed=1.5
training.seed=9223372036854775808 | training.warmup_epochs=-1 | training.optimizer= | training.optimizer=adamm
training.schedule=linear | training=3 | training.epochs.x=3 | training.__init__=3
data.image_size=7 | data.image_size=4096 | data.image_size=32.0 | data.crop=[8] | data.crop=32 | data.evaluation=tiles
data.labels_per_class=0 | data.labels_per_class=-1 | data.train_images=0 | data.seed=-1 | data.dataset=
data.dataset=../digits | data.dataset=[digits] | data.dataset=2026-11-26 | data.root=[a] | data.augment={rotation: 1000}
data.augment={mixup: -1} | data.augment={operations: many} | data.augment={crop: {}} | data.augment=[]
data.augment=digit | data=null | data={} | data=[]
teacher=null | teacher={} | teacher.network= | teacher.network=[test_vit, test_vit] | teacher.options={num_classes: 10}
teacher.options={3: 4} | teacher.options={checkpoint_path: x.pth} | teacher.options={pretrained: true}
teacher.options={depth:6} | teacher.options=[1] | teacher.pretrained=1 | teacher.min_score=-1 | teacher.min_score=97
teacher.training.epochs=0 | teacher.training=fast | teacher.training.optimizer=adamx
student=null | student.network= | student.network=[] | student.network=[a, a] | student.network={a: b}
name= | name=. | name=.. | name=.hidden | name=a b | name=h\u00e9h\u00e9 | name=true | name=-x | name=a/b | name=3
search.trials=0 | search.trials=-1 | search.trials=1e9x | search.metric=test/top1 | search.latency.threads=0
search.latency.runtime=tensorrt | search.latency.device=npu | search.metric=loss
search.costs={student/latency: {a: 1}} | search.costs=3
search.seed=-1 | search.parallel=0 | search.gpus_per_trial=0 | search.gpus_per_trial=all | search.prior_weight=2
search.prune=maybe | search.first_rung=2 | search.first_rung=0 | search.reduction_factor=1
search.confirm_seeds=-1 | search.max_failures=-1 | search.trails=3 | search.budget=lots
search.space=/dev/null | search.space=nowhere.yaml | search.space=null | search.space=[] | search.space={methods: null}
search.space={methods: [null]} | search.space={methods: [[kd]]} | search.space={methods: {kd: 1}}
search.space={methods: [heteroakd]} | search.space={methods: [hdc]} | search.space={methods: [kd, kd]}
search.space={methods: []} | search.space={shared: null} | search.space={shared: []}
search.space={shared: {training.learning_rate: null}} | search.space={shared: {training.: 1}}
search.space={shared: {training.seed: {low: 0, high: 3}}} | search.space={shared: {training.workers: 2}}
search.space={shared: {training.learning_rate: {low: 1e-3, high: 1e-1, step: 2}}}
search.space={shared: {training.batch_size: {options: [3, 7.5]}}}
search.space={overrides: {kd.temperature: {low: 1, high: 1e999}}} | search.space={overrides: {.: 3}}
search.space={overrides: {"": 3}} | search.space={overrides: {3: 3}} | search.space={overrides: {kd.temperature: }}
search.space={overrides: {kd.temprature: 2}} | search.space={overrides: {kd.temperature: {low: 8, high: 1}}}
search.space={overrides: {kd.temperature: 0}} | search.space.methods.x=3
cache=true | cache.enabled=maybe | cache.views=0 | cache.dtype=bf16 | cache.top_k=0 | cache.max_gb=0 | cache.max_gb=.inf
tracking.uri=3 | tracking.experiment=3 | tracking.registered_model= a/b | tracking.registered_model=a:b
tracking.registered_model='' | promotion.min_gain=2 | promotion.min_gain=.nan | promotion.max_latency_ms=0
promotion.max_size_mb=-1 | promotion=strict | techer=3 | teacher.b=3 | __class__=3
training={epochs: 3 | training.epochs=*x | training.epochs=@ | training.epochs=`ls`
training.epochs=!!python/object:os.system | training.epochs=!!timestamp x | training.epochs=!!int x
training.epochs=99999999999999999999999999 | training.epochs={a: !!binary aGk=} | training.epochs | =3 | a..b=3
"""
VALUES = [text.strip() for line in REFUSED_VALUES.strip().splitlines() for text in line.split(" | ")]

# Values that are found wrong with the data, the networks or the services: the sentence names the key.
FOUND_LATER = {
    "training.accumulate=3": "accumulate: 20 images",
    "training.min_learning_rate=0.2": "min_learning_rate: 0.2 is above learning_rate",
    "training.warmup_epochs=5": "warmup_epochs: 5 epochs",
    "data.crop=[32, 32]": "crop: is for segmentation",
    "data.dataset=image_folder": "set data.root to it",
    "data.labels_per_class=100000": "data.labels_per_class: class ",
    "data={dataset: digits, train_images: 1000000}": "data.train_images: there are ",
    "search.metric=val/miou": "search.metric: ",
    "search.space={overrides: {fbt.back_stage: 9}}": "overrides.fbt.back_stage: 9 is impossible",
    "teacher.network=test_vitt": "teacher.network 'test_vitt' is not one of timm's: did you mean 'test_vit'?",
    "teacher.network=../resnet18": "teacher.network '../resnet18' is not one of timm's",
    "teacher.network=resnet18.no_such_tag": "teacher.network 'resnet18.no_such_tag'",
    "teacher.network=segformer-mit_b0": "teacher.network 'segformer-mit_b0' has no option",
    "teacher.options={img_size: 31}": "teacher.network 'test_vit' does not run on 31 x 31",
    "teacher.options={no_such_option: 3}": "teacher.network 'test_vit' has no option 'no_such_option'",
    "teacher.options={patch_size: 64}": "teacher.network 'test_vit' does not run on 32 x 32",
    "teacher.options={depth: -3}": "teacher.network 'test_vit' cannot be built",
    "teacher.options={depth: lots}": "teacher.network 'test_vit' cannot be built",
    "teacher.options={global_pool: ''}": "teacher.network 'test_vit' gives a tensor of shape",
    "teacher.options={embed_dim: 7}": "teacher.network 'test_vit' cannot be built",
    "teacher.options={num_heads: 0}": "teacher.network 'test_vit' cannot be built",
    "teacher.checkpoint=.": "teacher.checkpoint: there is no file",
    "teacher.checkpoint=no.safetensors": "teacher.checkpoint: there is no file",
    "teacher.checkpoint=tiny.yaml": "teacher.checkpoint: weights tiny.yaml are damaged",
    "student.network=['']": "student.network '' is not one of timm's",
    "student.network=[test_resnet, resnet_18]": "student.network 'resnet_18'",
    "student.network=deeplabv3-resnet18": "student.network: 'deeplabv3-resnet18' does not fit data set 'digits'",
    "student.options={block_args: 3}": "student.network 'test_efficientnet' cannot be built",
    "cache.top_k=1000": "cache.top_k: 1000 logits",
    "tracking.uri=mlruns": "tracking.uri: mlruns is not a database",
    "tracking.uri=file:///tmp/mlruns": "tracking.uri: ",
    "tracking.uri=sqlite://": "tracking.uri: sqlite:// names no file",
    "tracking.uri=sqlite:///.": "tracking.uri: ",
    "tracking.uri=sqlite:///tiny.yaml": "tiny.yaml is no SQLite database",
    "tracking.uri=sqlite:///tiny.yaml/x.db": "tiny.yaml: cannot be used (File exists)",
    "tracking.uri=http://127.0.0.1:1": "tracking.uri: the MLflow server at http://127.0.0.1:1 does not answer",
    "tracking.uri=http://": "tracking.uri: ",
    "tracking.uri=http://[::1": "tracking.uri: ",
    "tracking.uri=http://127.0.0.1:99999": "tracking.uri: ",
    "tracking.uri=ftp://host/x": "tracking.uri: ",
    "tracking.uri=s3://bucket/x": "tracking.uri: ",
}

TEXTS = {
    "": "is empty",
    "# only\n": "is empty",
    "null": "is empty",
    "- a\n": "expected keys and values",
    "hello": "expected keys and values",
    "3": "expected keys and values",
    "name: [1": "e.yaml:1: is not valid YAML",
    "a: b: c": "e.yaml:1: is not valid YAML",
    "name: a\nname: b": "e.yaml:2: is not valid YAML: the key 'name' appears twice",
    "\tname: a": "a tab cannot indent",
    "a: &x 1\nb: *x": "anchors (&) and aliases (*) are not supported",
    "!!python/object/apply:os.system ['ls']": "is not valid YAML",
    "a: !!int x": "a value does not fit its tag",
    "a: !!float x": "a value does not fit its tag",
    "a: !!timestamp x": "a value does not fit its tag",
    "a: !!timestamp 2026-99-99": "a value does not fit its tag",
    "a: 1\n---\nb: 2": "is not valid YAML",
    "%YAML 9.9\n---\na: 1": "is not valid YAML",
    "a: \x07": "it contains control characters",
    "? [a, b]\n: 3": "is not valid YAML",
    "1: 2": "a key must be a string",
    "true: 1": "a key must be a string",
    "? !!binary aGk=\n: 1": "a key must be a string",
    "[" * 3000: "it is nested too deeply",
    "{" * 3000: "it is nested too deeply",
    "a: !!binary '***'": "there is no such key",
    "<<: 3": "e.yaml:1: merge keys (<<) are not supported",
    "training:\n  <<: {epochs: 3}": "e.yaml:2: training: merge keys (<<) are not supported",
    "training:\n  epochs: 010": "e.yaml:2: training.epochs: 010 is an octal number",
    "training: {learning_rate: -0_7}": "e.yaml:1: training.learning_rate: -0_7 is an octal number",
    "training: {epochs: !!int '017'}": "e.yaml:1: training.epochs: 017 is an octal number",
    "training:\n  epochs: 1:30": "e.yaml:2: training.epochs: 1:30 is a number to base 60",
    "training: {learning_rate: 1:30.5}": "training.learning_rate: 1:30.5 is a number to base 60",
    "name: no": "e.yaml:1: name: no means false",
    "student:\n  network:\n  - Off": "e.yaml:3: student.network[0]: Off means false",
    "cache: {enabled: YES}": "e.yaml:1: cache.enabled: YES means true",
    "on: 3": "e.yaml:1: on: on means true",
    "cache: {max_gb: -.INF}": "e.yaml:1: cache.max_gb: -.INF is not a finite number",
    "promotion:\n- .nan": "e.yaml:2: promotion[0]: .nan is not a finite number",
    "training: {epochs: 08}": "training.epochs: expected a whole number, got '08'",
    "training: {epochs: 0o10}": "training.epochs: expected a whole number, got '0o10'",
    "a: " + "9" * 5000: "is not valid YAML",
    "a: 0x" + "f" * 5000: "a whole number is too large",
    "name: 'x": "is not valid YAML",
    "name: a": "data: is missing; add it",
}


def folder_case(make: Make) -> Make:
    """The data set `there`, two classes of twenty images, then something done to them."""

    def prepare(where: Path) -> None:
        write_classes(where / "there", {"cat": 20, "dog": 20})
        make(where / "there")

    prepare.__name__ = make.__name__
    return prepare


def every(change: Callable[[Path], None]) -> Make:
    """All images of a class: train has some of them, whatever the split."""

    def prepare(folder: Path) -> None:
        for file in (folder / "cat").iterdir():
            change(file)

    prepare.__name__ = change.__name__
    return folder_case(prepare)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def a_text(file: Path) -> None:
    file.write_text("not an image")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def gone(file: Path) -> None:
    file.unlink()


def a_bomb(file: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def only_float(file: Path) -> None:
    Image.new("F", (20, 20)).save(file.with_suffix(".tiff"))
    file.with_suffix(".tiff").rename(file)
    cut_off(file)


def one_class(folder: Path) -> None:
    for file in (folder / "dog").iterdir():
        file.unlink()
    (folder / "dog").rmdir()


def one_image(folder: Path) -> None:
    for file in sorted((folder / "dog").iterdir())[1:]:
        file.unlink()


def no_images(folder: Path) -> None:
    for file in (folder / "dog").iterdir():
        file.unlink()


def val_without_train(folder: Path) -> None:
    write_classes(folder / "val", {"cat": 3, "dog": 3})


def other_classes_in_val(folder: Path) -> None:
    write_classes(folder / "train", {"cat": 9, "dog": 9})
    write_classes(folder / "val", {"cat": 9, "dog": 3, "emu": 3})


IMAGES: list[tuple[Make, str]] = [
    (every(cut_off), "there/cat/"),
    (every(emptied), "is empty"),
    (every(a_text), "cannot be read as an image"),
    (every(a_bomb), "has 100000 x 100000 pixels, data.max_megapixels allows 180 million"),
    (every(only_float), "cannot be read as an image"),
    (every(a_folder), "there/cat: holds no images"),
    (every(a_dangling_link), "there/cat: holds no images"),
    (every(gone), "there/cat: holds no images"),
    (folder_case(one_class), "there: expected a folder for each of two or more classes, found 1"),
    (folder_case(one_image), "data.root: class 'dog' has 1 image(s)"),
    (folder_case(no_images), "there/dog: holds no images"),
    (folder_case(val_without_train), "there: has val but no train"),
    (folder_case(other_classes_in_val), "class 'emu' is not in train"),
]

LISTS = {
    "cifar100": ("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),
    "cub200": tuple(
        f"CUB_200_2011/{name}.txt" for name in ("images", "classes", "image_class_labels", "train_test_split")
    ),
    "fgvc_aircraft": tuple(
        f"fgvc-aircraft-2013b/data/{name}.txt" for name in ("variants", "images_variant_train", "images_variant_val")
    ),
    "voc2012": tuple(f"VOCdevkit/VOC2012/ImageSets/Segmentation/{name}.txt" for name in ("train", "val")),
}
DAMAGES = {"gone": None, "empty": b"", "junk": b"\xff\x00junk\n3"}

COMMANDS = [
    ("search", "No such", None),
    ("search tiny.yml", "did you mean 'tiny.yaml'?", None),
    ("search no/such/tiny.yaml", "no/such/tiny.yaml: there is no such file", None),
    ("search tiny.yaml/x", "tiny.yaml/x: cannot be read", None),
    ("search .", ".: cannot be read (Is a directory)", None),
    ("search /dev/null", "/dev/null: is a device or a pipe", None),
    (f"search {'x' * 300}.yaml", "cannot be read", None),
    ("searhc tiny.yaml", "No such command", None),
    ("search tiny.yaml --resum", "No such option", None),
    ("search tiny.yaml --trials many", "--trials", None),
    ("search tiny.yaml --trials 0", "search.trials", None),
    ("search tiny.yaml --trials 10000000", "search.trials", None),
    ("search tiny.yaml --address nonsense", "--address nonsense: expected HOST:PORT", None),
    ("search tiny.yaml --address 127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers", None),
    ("search tiny.yaml --address ray://127.0.0.1:99999", "--address ray://127.0.0.1:99999: ", None),
    ("search tiny.yaml --address http://127.0.0.1:6379", "expected HOST:PORT", None),
    ("search tiny.yaml --root tiny.yaml", "'tiny.yaml' is a file", None),
    ("search tiny.yaml --root tiny.yaml/runs", "'tiny.yaml' is a file", None),
    ("distill tiny.yaml", "--method", None),
    ("distill tiny.yaml --method hdc", "--method hdc: there is no such method", None),
    ("distill tiny.yaml --method heteroakd", "heteroakd", None),
    ("distill tiny.yaml --method kd --root tiny.yaml", "'tiny.yaml' is a file", None),
    ("reproduce tiny.yaml --seeds 0", "--seeds", None),
    ("reproduce tiny.yaml --methods hdc", "--methods hdc: ", None),
    ("reproduce nothing.yaml", "nothing.yaml: there is no such file", None),
    ("teacher nothing.yaml", "nothing.yaml: there is no such file", None),
    ("cache", "give an EXPERIMENT", None),
    ("cache --list x", "takes no name", None),
    ("cache --list --verify", "give a single option", None),
    ("cache --prune", "names no caches", None),
    ("cache --prune --unused-for soon", "--unused-for soon", None),
    ("cache --prune --max-size big", "--max-size big", None),
    ("cache --all", "need --prune", None),
    ("cache nothing.yaml", "nothing.yaml: there is no such file", None),
    ("cache tiny.yaml --set cache.enabled=false", "cache.enabled: is false", None),
    ("cache --verify abcdef", "abcdef", None),
    ("report nothing", "there is no study 'nothing'", None),
    ("report ../x", "there is no study '../x'", None),
    ("compare nothing", "there is no study 'nothing'", None),
    ("promote nothing", "there is no study 'nothing'", None),
    ("methods hdc", "did you mean 'hcd'?", None),
    ("datasets x", "unexpected extra argument", None),
    ("plan", "Missing argument", None),
    ("plan nothing.yaml", "nothing.yaml: there is no such file", None),
    ("plan tiny.yaml --set training.epochs=0", "error: --set training.epochs=0", None),
    ("plan tiny.yaml --set search.budget.money=3", "search.budget", None),
    ("plan tiny.yaml --set teacher.checkpoint=no.safetensors", "teacher.checkpoint: there is no file", None),
    ("plan tiny.yaml --set teacher.network=test_vitt", "did you mean 'test_vit'?", None),
    ("plan tiny.yaml --address nonsense", "--address nonsense: expected HOST:PORT", None),
    ("plan tiny.yaml --address 127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers", None),
    ("plan tiny.yaml --root tiny.yaml", "'tiny.yaml' is a file", None),
    ("match", "Missing argument", None),
    ("match nothing.yaml", "nothing.yaml: there is no such file", None),
    ("match tiny.yaml --set student.network=resnet_18", "student.network 'resnet_18'", None),
    ("match tiny.yaml --set data.dataset=digit_scenes", "labels_per_class: counts images of one class", None),
    ("match tiny.yaml --set teacher.checkpoint=no.safetensors", "teacher.checkpoint: there is no file", None),
    ("match tiny.yaml --root tiny.yaml/runs", "'tiny.yaml' is a file", None),
    ("auto", "Missing argument", None),
    ("auto there", "Missing option", None),
    ("auto there --teacher test_vit", "there: there is no such folder", None),
    ("auto tiny.yaml --teacher test_vit", "tiny.yaml: there is no such folder", None),
    ("auto there --teacher test_vit --budget soon", "--budget soon: expected a number and one of", None),
    ("auto there --teacher test_vit --budget 0h", "--budget 0h: expected a period longer than zero", None),
    ("auto there --teacher test_vit --max-params-m -1", "--max-params-m", None),
    ("auto there --teacher test_vit --out .", "--out", None),
    ("auto there --teacher test_vitt", "--teacher test_vitt: timm has no such network", folder_case(lambda _: None)),
    (
        "auto there --teacher test_vit",
        "there: expected a folder for each of two or more classes",
        folder_case(one_class),
    ),
    ("auto there --teacher test_vit", "there: class 'dog' has 1 usable training images", folder_case(one_image)),
    ("auto there --teacher test_vit", "there: has val but no train", folder_case(val_without_train)),
    (
        "auto there --teacher test_vit --student resnet_18",
        "--student resnet_18: timm has no such network",
        folder_case(lambda _: None),
    ),
    (
        "auto there --teacher test_vit --student test_resnet --max-params-m 0.001",
        "--student test_resnet: 0.373 M parameters",
        folder_case(lambda _: None),
    ),
    ("compare", "Missing argument", None),
    ("compare ../x", "there is no study '../x'", None),
    ("compare nothing --root tiny.yaml", "'tiny.yaml' is a file", None),
    ("export", "Missing argument", None),
    ("export models:/nothing@champion", "Missing option", None),
    ("export models:/nothing@champion --out o", "runs/mlflow.db: there is no MLflow store yet", None),
    ("export models:/m-1 --out o --root nowhere", "nowhere/mlflow.db: there is no MLflow store yet", None),
    ("export models:/a@b --out o --format onx", "--format onx: there is no such format; did you mean 'onnx'?", None),
    ("export studies/nothing --out o", "there is no study 'nothing'", None),
    ("export nothing --out o", "there is no study 'nothing'", None),
    ("export no/such/trial --out o", "no/such/trial: is neither the folder of a study nor of a trial", None),
    ("export tiny.yaml/x --out o", "tiny.yaml/x: is neither the folder of a study nor of a trial", None),
    ("promote nothing --trial -1", "--trial", None),
    ("promote nothing --trial many", "--trial", None),
    ("rollback", "Missing argument", None),
    ("rollback nothing", "runs/mlflow.db: there is no MLflow store yet", None),
    ("rollback models:/nothing@champion", "runs/mlflow.db: there is no MLflow store yet", None),
    ("rollback nothing --root tiny.yaml", "'tiny.yaml' is a file", None),
    ("doctor", "Missing argument", None),
    ("doctor nothing.yaml", "nothing.yaml: there is no such file", None),
    ("doctor tiny.yaml --set search.trials=0", "error: --set search.trials=0", None),
    ("doctor tiny.yaml --set student.network=resnet_18", "student.network 'resnet_18'", None),
    ("doctor tiny.yaml --address nonsense", "--address nonsense: expected HOST:PORT", None),
    ("doctor tiny.yaml --address 127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers", None),
    ("doctor tiny.yaml --root tiny.yaml", "'tiny.yaml' is a file", None),
    ("ui", "runs/mlflow.db: there is no MLflow store yet", None),
    ("ui nothing", "there is no study 'nothing'", None),
    ("ui --root tiny.yaml", "'tiny.yaml' is a file", None),
    ("ui --root nowhere", "nowhere/mlflow.db: there is no MLflow store yet", None),
    ("ui --port 0", "--port", None),
    ("ui --port 70000", "--port", None),
    ("ui --port many", "--port", None),
]


class WorkHasBegun(BaseException):
    """Raised where a wrong input got through: passes every `except Exception`."""


@pytest.fixture
def refused(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_file: Callable[..., Path]
) -> Iterator[Callable[..., str]]:
    """Runs a command line that must be refused, in a folder with tiny.yaml; what it says on stderr."""
    tiny_file()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def begun(*_: object, **__: object) -> None:
        raise WorkHasBegun

    for module in (
        heterokd.execution.driver,
        heterokd.execution.distill,
        heterokd.execution.reproduce,
        heterokd.cli.cache_build,
        heterokd.execution.match,
        heterokd.execution.auto,
        heterokd.execution.planning.measure_costs,
    ):
        for name in ("prepare_teacher", "prepare_teachers"):
            monkeypatch.setattr(module, name, begun, raising=False)
    # Relative names mean another folder in each test.
    heterokd.training.data._splits.cache_clear()
    heterokd.datasets._load.cache_clear()

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, _, said = cli(*arguments)
        assert code == 2, said
        assert "Traceback" not in said
        lines = said.splitlines()
        assert lines[0].startswith("Usage: ") or all(line.startswith("error: ") for line in lines), said
        assert sorted(tmp_path.rglob("*")) == before, "it has left something"
        return said

    yield run
    heterokd.training.data._splits.cache_clear()
    heterokd.datasets._load.cache_clear()


def test_there_are_at_least_150() -> None:
    lists = len(DAMAGES) * sum(len(files) for files in LISTS.values())
    assert len(VALUES) + len(FOUND_LATER) + len(TEXTS) + len(IMAGES) + len(COMMANDS) + lists >= 300


@pytest.mark.parametrize("text", VALUES)
def test_a_value_that_is_refused(refused: Callable[..., str], text: str) -> None:
    said = refused("search", "tiny.yaml", "--set", text)
    assert said.startswith(f"error: --set {text}")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("text", FOUND_LATER)
def test_a_value_that_is_found_wrong(refused: Callable[..., str], text: str) -> None:
    said = refused("search", "tiny.yaml", "--set", text)
    assert FOUND_LATER[text] in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:40]))
def test_a_file_that_is_no_experiment(refused: Callable[..., str], tmp_path: Path, text: str) -> None:
    (tmp_path / "e.yaml").write_text(text)
    said = refused("search", "e.yaml")
    assert said.startswith("error: e.yaml:")
    assert TEXTS[text] in said


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x89PNG\r\n", b"a: \xed\xa0\xbd"])
def test_a_file_that_is_no_text(refused: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "e.yaml").write_bytes(content)
    assert "e.yaml: is not text in UTF-8" in refused("search", "e.yaml")


@pytest.mark.parametrize(("make", "says"), IMAGES, ids=[make.__name__ for make, _ in IMAGES])
def test_images(refused: Callable[..., str], tmp_path: Path, make: Make, says: str) -> None:
    make(tmp_path)
    data = "data={dataset: image_folder, root: there, image_size: 32}"
    for command in (["search", "tiny.yaml"], ["distill", "tiny.yaml", "--method", "kd"]):
        said = refused(*command, "--set", data)
        assert says in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in LISTS.items() for file in files])
def test_lists_of_data_sets(refused: Callable[..., str], tmp_path: Path, name: str, file: str, damage: str) -> None:
    (tmp_path / "there").mkdir()
    DATA_SETS[name].write(tmp_path / "there")
    content = DAMAGES[damage]
    if content is None:
        (tmp_path / "there" / file).unlink()
    else:
        (tmp_path / "there" / file).write_bytes(content)
    more = [
        "teacher={network: segformer-mit_b0}",
        "student={network: fpn-test_resnet}",
        "search.space.methods=[pixel_kd]",
    ]
    changes = [f"data={{dataset: {name}, root: there, image_size: 32}}", *(more if name == "voc2012" else [])]
    said = refused("search", "tiny.yaml", *(part for text in changes for part in ("--set", text)))
    assert said.startswith(f"error: there/{file}: ") or "there/" in said


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set_that_is_not_there(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    segments = heterokd.datasets.DATASETS[name].tasks == "segmentation"
    more = [
        "teacher={network: segformer-mit_b0}",
        "student={network: fpn-test_resnet}",
        "search.space.methods=[pixel_kd]",
    ]
    changes = [f"data={{dataset: {name}, root: there, image_size: 32}}", *(more if segments else [])]
    arguments = ["search", "tiny.yaml", *(part for text in changes for part in ("--set", text))]
    assert "there" in refused(*arguments)
    (tmp_path / "there").mkdir()
    assert "there" in refused(*arguments)


@pytest.mark.parametrize(("line", "says", "make"), COMMANDS, ids=[line[:60] for line, _, _ in COMMANDS])
def test_a_command_line(refused: Callable[..., str], tmp_path: Path, line: str, says: str, make: Make | None) -> None:
    if make is not None:
        make(tmp_path)
    said = refused(*line.split())
    assert says in said or (line == "search" and "Missing argument" in said)


def of_another_network(file: Path) -> None:
    save_weights(build_network("test_resnet", 10), file)


def of_other_classes(file: Path) -> None:
    save_weights(build_network("test_vit", 7, {"img_size": 32, "patch_size": 8}), file)


def half_of_them(file: Path) -> None:
    save_weights(build_network("test_vit", 10, {"img_size": 32, "patch_size": 8}), file)
    cut_off(file)


@pytest.mark.parametrize("make", [emptied, a_text, of_another_network, half_of_them])
@pytest.mark.parametrize("command", ["search", "distill", "reproduce", "teacher", "cache"])
def test_checkpoints(refused: Callable[..., str], tmp_path: Path, make: Make, command: str) -> None:
    make(tmp_path / "weights.safetensors")
    more = ["--method", "kd"] if command == "distill" else []
    said = refused(command, "tiny.yaml", *more, "--set", "teacher.checkpoint=weights.safetensors")
    assert said.startswith("error: teacher.checkpoint: weights weights.safetensors")


def test_a_port_that_is_taken(refused: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: the port is in use" in refused("ui", "--port", str(port))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Permissions count, for the superuser too: this thread gives up the two capabilities that pass over them."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    kept = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, kept) == 0
    given_up = (ctypes.c_uint32 * 6)(*kept)
    given_up[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective set
    assert libc.capset(header, given_up) == 0
    try:
        yield
    finally:
        assert libc.capset(header, kept) == 0


@pytest.mark.parametrize("command", ["search", "distill", "reproduce", "teacher", "cache"])
def test_a_root_that_may_not_be_written(refused: Callable[..., str], tmp_path: Path, command: str) -> None:
    (tmp_path / "runs").mkdir(mode=0o555)
    more = ["--method", "kd"] if command == "distill" else []
    with without_privileges():
        said = refused(command, "tiny.yaml", *more)
    assert "'runs' cannot be used (Permission denied)" in said


def test_files_that_may_not_be_read(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").chmod(0)
    with without_privileges():
        assert "tiny.yaml: cannot be read (Permission denied)" in refused("search", "tiny.yaml")


def test_images_that_may_not_be_read(refused: Callable[..., str], tmp_path: Path) -> None:
    write_classes(tmp_path / "there", {"cat": 20, "dog": 20})
    data = ("--set", "data={dataset: image_folder, root: there, image_size: 32}")
    (tmp_path / "there" / "cat").chmod(0)
    try:
        with without_privileges():
            assert "there/cat" in refused("search", "tiny.yaml", *data)
    finally:
        (tmp_path / "there" / "cat").chmod(0o755)


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "tiny.yaml", "--set", "training.epochs=!!int x"],
        pytest.param(["search", "tiny.yaml", "--set", "tracking.uri=http://[::1"], marks=pytest.mark.thorough),
        pytest.param(["teacher", "tiny.yaml", "--root", "tiny.yaml"], marks=pytest.mark.thorough),
    ],
    ids=" ".join,
)
def test_in_a_process_of_its_own(tmp_path: Path, tiny_file: Callable[..., Path], arguments: list[str]) -> None:
    tiny_file()
    command = [sys.executable, "-m", "heterokd", *arguments]
    path = os.pathsep.join([str(Path(heterokd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.yaml"]


# The inputs of `benchmarks/bad_inputs.py`.
MORE = {f"{case.kind}: {case.title}": case for case in all_cases()}
# Those that were not refused properly before.
MENDED = (
    "override: ' training.epochs=3'",
    "method file: search: exits",
    "method file: search: needs",
    "method file: search: forward",
    "special file: methods: [./it.py:My], a fifo",
    "value: tracking.also=[cvs]",
    "value: search.objectives=[student/params_m]",
    "root: report nothing --root it, a loop",
    "root: search tiny.yaml --root it, a dangling",
    "command line: search tiny.yaml --root s3://",
    "command line: search tiny.yaml --address [::1",
    "command line: distill tiny.yaml --method kd --set search.space.methods=[dkdd]",
    "command line: reproduce tiny.yaml --methods ,",
    "command line: cache --prune --all --max-size 3GB",
    "command line: cache tiny.yaml tiny.yaml",
    "command line: auto . --teacher test_vit --max-params-m 0",
    "environment: MLFLOW_TRACKING_URI=nonsense ui",
    "environment: MLFLOW_TRACKING_URI=http://127.0.0.1:port search tiny.yaml",
)


def assert_refused(case: BadInput) -> None:
    fault, said = fault_of(case)
    assert fault is None, f"{fault}\n{said}"


def test_there_are_more_than_150_inputs() -> None:
    assert len(MORE) == len(list(all_cases())) >= 150, "two inputs have the same title"


@pytest.mark.parametrize("title", MENDED)
def test_an_input_is_refused_in_a_sentence(title: str) -> None:
    assert_refused(MORE[title])


def test_an_objective_that_is_no_metric_is_a_single_fault() -> None:
    _, said = fault_of(MORE["value: search.objectives=[student/params_m]"])
    assert len(said.splitlines()) == 1
    assert "the first objective is the metric" in said


@pytest.mark.thorough
@pytest.mark.parametrize("title", [title for title in MORE if title not in MENDED])
def test_every_other_input_is_refused_in_a_sentence(title: str) -> None:
    assert_refused(MORE[title])
