"""Cases of `bad_inputs.py`, by kind."""

from __future__ import annotations

import os
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


@dataclass(frozen=True)
class BadInput:
    """A command line that must be refused.

    Attributes:
        kind: what is bad about it.
        line: words of the command line, separated by blanks; a tuple keeps words with blanks.
        names: text that the sentence must contain: the file or the key.
        make: creates files in the current directory first.
        environment: variables to set.
        title: short name.
    """

    kind: str
    line: str | tuple[str, ...]
    names: str
    make: Callable[[], object] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    title: str = ""

    @property
    def words(self) -> list[str]:
        """The arguments of the command."""
        return self.line.split() if isinstance(self.line, str) else list(self.line)


# Values of an experiment; the sentence names the key.
VALUES = """
search.budget.trials=0 | search.budget.hours=-1 | search.budget.hours=2h | search.budget.money=3
search.budget.price=0 | search.budget={hour: 3} | search.budget=[3] | search.budget.trainings=.inf
search.pruner=MedianPruner | search.pruner=optuna.pruners | search.pruner={options: {}} | search.pruner=3
search.pruner=optuna.pruners:NoSuchPruner | search.pruner=no_such_module:Pruner | search.pruner=os:getcwd
search.pruner={name: optuna.pruners:MedianPruner, options: {startup: 3}} | search.sampler=optuna:samplers:TPE
search.sampler={name: "a b:C"} | search.sampler={name: optuna.samplers:TPESampler, options: {seed: 3}}
search.sampler={nam: optuna.samplers:TPESampler} | search.sampler={name: optuna.samplers:TPESampler, options: [3]}
search.sampler=optuna.samplers:NoSuchSampler | search.sampler=optuna.pruners:MedianPruner
search.objectives=[student/params_m] | search.objectives=[val/top1, val/loss]
search.objectives=[val/top1, student/speed]
search.objectives=[val/top1, student/params_m, student/params_m] | search.objectives=val/top1
search.limits={student/speed: 1} | search.limits={student/params_m: 1} | search.limits={student/flops_g: 0}
search.limits={student/flops_g: fast} | search.limits=[1] | search.max_params_m=0 | search.max_latency_ms=-1
search.max_params_m=0.0001 | search.limits={student/flops_g: 1e-9}
search.max_latency_ms=5ms | search.trial_timeout=soon | search.trial_timeout=0 | search.trial_timeout=-5m
search.trial_timeout=[3] | search.confirm_share=1 | search.confirm_share=-0.1 | search.confirm_share=half
search.confirm_leaders=-1 | search.confirm_leaders=1.5 | search.warm_start_from=3 | search.warm_start_from=[3]
search.warm_start_from=[nothing] | search.warm_start_from=[../x]
search.match_starts=perhaps | search.trials=10001x | search.reduction_factor=2.5
search.prior_weight=.nan | search.max_failures=0.5
cluster=3 | cluster.nodes=[3] | cluster.nodes={gpu: 3} | cluster.nodes={gpu: {count: 0}}
cluster.nodes={gpu: {count: many}} | cluster.nodes={gpu: {price_per_hour: -1}} | cluster.nodes={gpu: {price: 3}}
cluster.nodes={gpu: {price_per_hour: .inf}} | cluster.currency=3 | cluster.currency=[USD] | cluster.node=3
promotion.max_params_m=0 | promotion.limits={student/latency_ms: 3} | promotion.limits={size: 3}
promotion.export_parity=maybe | promotion.min_gain=-2 | promotion.max_size_mb=10MB | promotion.gain=0.1
tracking.also=[3] | tracking.also={csv: 1} | tracking.also=[cvs] | tracking.also=[no_such_module:Tracker]
tracking.also=[./nowhere.py:Tracker] | tracking.also=[os:path] | tracking.experiment=" a" | tracking.experiment=""
tracking.registered_model="a%b" | tracking.registered_model=.. | tracking.registered_model="o'brien"
training.workers=[2] | training.workers=[3, 2] | training.workers=[1, 2, 3] | training.workers=[0, 2]
training.workers=1.5 | training.workers=64 | training.gpus_per_worker=-1 | training.gpus_per_worker=1.5
training.gpus_per_worker=all | training.gather=both | training.sync_batch_norm=2 | training.task_weight=-1
training.task_weight=.inf | training.min_learning_rate=-1 | training.channels_last=1 | training.schedule=[cosine]
teacher.training.workers=0 | teacher.training.learning_rate=0 | teacher.training.schedule=exp
teacher.training={epoch: 3} | teacher.checkpoint={test_resnet: a.pt} | teacher.checkpoint=3
teacher.options={test_vit: 3} | teacher.network=[test_vit, 3] | student.options=7 | student.pretrained=perhaps
student.checkpoint=a.pt | data.image_size=[32, 32] | data.labels_per_class=2.5 | data.train_images=many
data.evaluation=whole image | data.extension={} | data.root=3 | data.augment={crop: 3} | data.augment={flip: 2}
cache.views=1.5 | cache.dtype=float16 | cache.dtype=[fp32] | cache.max_gb=50GB | cache.path=/tmp | cache=[]
name=CON/aux | name="a\\nb" | name=\u540d\u524d | name="x " | name=a%20b | name=[a] | name={a: b}
"""
IN_SPACE = """
methods: kd | methods: {all: true} | methods: [all] | methods: all of them | methods: [kd, ""] | methods: [./no.py:X]
methods: [./tiny.yaml:X] | method: [kd] | shared: [training.learning_rate] | shared: {learning_rate: 0.1}
shared: {training.learning_rate: {low: 0.1}} | shared: {training.learning_rate: {low: 0, high: 1, log: true}}
shared: {training.learning_rate: {low: 0.1, high: 0.1, step: 0}} | shared: {training.learning_rate: {min: 0.1, max: 1}}
shared: {training.learning_rate: {low: a, high: b}} | shared: {training.learning_rate: [0.1, -0.1]}
shared: {training.optimizer: [sgd, adamm]} | shared: {training.epochs: {low: 1, high: 1e9}}
shared: {training.precision: {low: 0, high: 1}} | shared: {training.batch_size: {options: []}}
shared: {training.batch_size: {options: [20, 20]}} | shared: {training.compile: [true, maybe]}
shared: {teacher.network: [test_vit]} | shared: {kd.temperature: {low: 1, high: 2}}
overrides: {kd: 3} | overrides: {kd.temperature: [1, x]} | overrides: {kd.temperature: {low: 1, high: 2, log: maybe}}
overrides: {kd.temperature: {low: 1, high: 2, q: 3}} | overrides: {kd.temperature: true} | overrides: {kd.: 3}
overrides: {.temperature: 3} | overrides: {kd.temperature.x: 3} | overrides: {nkd.temperature: -1} | overrides: [kd]
defaults: {kd.temperature: [1]} | defaults: {kd.nothing: 1} | extensions: {kd: 3} | extensions: [x] | {}: 3
"""
SPACE_FILES = {
    "list": b"- kd\n",
    "text": b"kd",
    "empty": b"",
    "binary": b"\xff\xfe\x00\x01",
    "tab": b"methods:\n\t- kd\n",
    "octal": b"methods: [kd]\nshared: {training.epochs: 010}\n",
    "alias": b"methods: &m [kd]\nshared: *m\n",
    "twice": b"methods: [kd]\nmethods: [dkd]\n",
    "experiment": b"name: x\ndata: {dataset: digits}\n",
    "unknown key": b"metods: [kd]\n",
}
OVERRIDES = {
    "": "--set",
    "=": "--set",
    "=3": "--set",
    "training.epochs": "training.epochs",
    "training.epochs 3": "training.epochs 3",
    ".training=3": ".training",
    "training..epochs=3": "training..epochs",
    "training.epochs.=3": "training.epochs.",
    " training.epochs=3": "training.epochs",
    "training.epochs =3": "training.epochs",
    "TRAINING.EPOCHS=3": "TRAINING",
    "training.epochs==3": "training.epochs",
    "training.epochs:3": "training.epochs:3",
    "training.epochs=3\nname=x": "training.epochs",
    "training.epochs=\x00": "training.epochs",
    "training.epochs=\udcff": "training.epochs",
    "schema=99": "schema",
    "schema=0": "schema",
    "schema=x": "schema",
    "data=[dataset, digits]": "data",
    "teacher.options.depth=": "teacher.options",
    "search.space.methods=kd dkd": "search.space",
    "search.space.shared.training.epochs=[0]": "search.space.shared",
}
METHODS = {
    "no class": ("x = 3\n", "My"),
    "no method": ("class My:\n    pass\n", "My"),
    "abstract": ("from heterokd.method import Method\nclass My(Method):\n    pass\n", "My"),
    "syntax": ("class My(:\n", "my.py:1"),
    "indent": ("class My:\nx = 3\n", "my.py:2"),
    "zero byte": ("class My:\n    x = '\x00'\n", "my.py"),
    "raises": ("raise RuntimeError('a\\nb')\nclass My: pass\n", "my.py"),
    "exits": ("import sys\nsys.exit(7)\nclass My: pass\n", "my.py"),
    "recursion": ("def f(): f()\nf()\nclass My: pass\n", "my.py"),
    "assertion": ("assert False\nclass My: pass\n", "my.py"),
    "imports nothing": ("import no_such_module\nclass My: pass\n", "my.py"),
    "imports a name": ("from torch import no_such_name\nclass My: pass\n", "my.py"),
    "relative import": ("from . import kd\nclass My: pass\n", "my.py"),
    "taken": ("from heterokd.methods.kd import KD as K\nclass My(K):\n    pass\nclass KD(K):\n    pass\n", "KD"),
    "params": ("from heterokd.methods.kd import KD\nclass My(KD):\n    Params = 3\n", "My"),
    "params without default": (
        "from heterokd.method import MethodParams\nfrom heterokd.methods.kd import KD\n"
        "class My(KD):\n    class Params(MethodParams):\n        t: float\n",
        "My",
    ),
    "needs": ("from heterokd.methods.kd import KD\nclass My(KD):\n    teacher_needs = 'logits'\n", "My"),
    "tasks": ("from heterokd.methods.kd import KD\nclass My(KD):\n    tasks = {'detection'}\n", "My"),
    "init": ("from heterokd.methods.kd import KD\nclass My(KD):\n    def __init__(self, a): pass\n", "My"),
    "build": ("from heterokd.methods.kd import KD\nclass My(KD):\n    def build(self): pass\n", "My"),
    "build raises": (
        "from heterokd.methods.kd import KD\nclass My(KD):\n    def build(self, *a): raise IndexError\n",
        "My",
    ),
    "forward": ("from heterokd.methods.kd import KD\nclass My(KD):\n    def forward(self): return {}\n", "My"),
    "function": ("def My(): pass\n", "My"),
    "metaclass": ("class M(type):\n    def __new__(*a): raise OSError\nclass My(metaclass=M): pass\n", "my.py"),
}
COMMANDS = {
    "search tiny.yaml tiny.yaml": "tiny.yaml",
    "search tiny.yaml --trials 1.5": "--trials",
    "search tiny.yaml --trials": "--trials",
    "search tiny.yaml --trials 1e3": "--trials",
    "search tiny.yaml --set": "--set",
    "search --set training.epochs=3": "EXPERIMENT",
    "search tiny.yaml --address": "--address",
    "search tiny.yaml --address :": "--address",
    "search tiny.yaml --address localhost": "--address",
    "search tiny.yaml --address localhost:port": "--address",
    "search tiny.yaml --address localhost:0": "--address",
    "search tiny.yaml --address [::1": "--address",
    "search tiny.yaml --address ray://": "--address",
    "search tiny.yaml --address https://ray:443": "--address",
    "search tiny.yaml --root": "--root",
    "search tiny.yaml --root s3://": "s3://",
    "search tiny.yaml --root s3:///x": "s3:///x",
    "search tiny.yaml --root ftp://host/x": "ftp://host/x",
    "search tiny.yaml --root http://host/x": "http://host/x",
    "search tiny.yaml --root file://": "file://",
    "search tiny.yaml --root file://relative/x": "file://relative/x",
    "search tiny.yaml --root gs://": "gs://",
    "search tiny.yaml --root /proc/nowhere": "/proc",
    "search tiny.yaml --root /dev/null": "/dev/null",
    "search tiny.yaml --root /dev/null/x": "/dev/null",
    "search tiny.yaml --json=yes": "--json",
    "distill tiny.yaml --method": "--method",
    "distill tiny.yaml --method kd,dkd": "--method",
    "distill tiny.yaml --method all": "--method",
    "distill tiny.yaml --method KD": "--method",
    "distill tiny.yaml --method ./nowhere.py:My": "nowhere.py",
    "distill tiny.yaml --method ./nowhere.py": "nowhere.py",
    "distill tiny.yaml --method kd --set search.space.methods=[dkdd]": "search.space.methods",
    "reproduce tiny.yaml --seeds many": "--seeds",
    "reproduce tiny.yaml --methods ,": "--methods",
    "reproduce tiny.yaml --methods all": "--methods",
    "teacher tiny.yaml --set teacher.network=[]": "teacher.network",
    "cache --list --prune": "--list",
    "cache --prune --max-size -3GB": "--max-size",
    "cache --prune --unused-for -3d": "--unused-for",
    "cache --prune --all --max-size 3GB": "--all",
    "cache tiny.yaml tiny.yaml": "tiny.yaml",
    "cache --dry-run": "--dry-run",
    "cache --verify ../x": "../x",
    "cache --prune ../x": "../x",
    "cache --list --address 127.0.0.1:1": "--address",
    "cache --list --set a=b": "--set",
    "report /": "/",
    "report .": ".",
    "report a\x00b": "a",
    "report tiny.yaml": "tiny.yaml",
    "compare a/b": "a/b",
    "promote .": ".",
    "promote nothing --alias v1": "--alias",
    "promote nothing --alias latest": "--alias",
    "promote nothing --alias a.b": "--alias",
    "promote nothing --trial 1.5": "--trial",
    "rollback .. --root runs": "mlflow.db",
    "rollback a/b": "mlflow.db",
    "export models:/ --out o": "mlflow.db",
    "export models:/a --out o": "mlflow.db",
    "export models:/a/b/c --out o": "mlflow.db",
    "export runs:/abc/model --out o": "runs:/abc",
    "export s3://bucket/x --out o": "s3://bucket/x",
    "export models:/a@b --out tiny.yaml": "mlflow.db",
    "export models:/a@b --out /dev/null": "mlflow.db",
    "export models:/a@b --out": "--out",
    "export tiny.yaml --out o": "tiny.yaml",
    "export . --out o": ".",
    "plan tiny.yaml --set cluster.nodes={gpu:3}": "cluster.nodes",
    "auto": "IMAGES_DIR",
    "auto . --teacher test_vit": ".",
    "auto nowhere --teacher test_vit": "nowhere",
    "auto . --teacher": "--teacher",
    "auto . --teacher test_vit --max-params-m few": "--max-params-m",
    "auto . --teacher test_vit --max-params-m nan": "--max-params-m",
    "auto . --teacher test_vit --max-params-m 0": "--max-params-m",
    "auto . --teacher test_vit --max-latency-ms inf": "--max-latency-ms",
    "auto . --teacher test_vit --max-latency-ms 0": "--max-latency-ms",
    "auto . --teacher test_vit --budget 2": "--budget",
    "auto . --teacher test_vit --budget -2h": "--budget",
    "auto . --teacher test_vit --budget 1e400h": "--budget",
    "auto . --teacher test_vit --budget nanh": "--budget",
    "auto /dev/null --teacher test_vit": "/dev/null",
    "doctor tiny.yaml --root tiny.yaml/x": "tiny.yaml",
    "ui --port -1": "--port",
    "ui --port 5000.5": "--port",
    "ui nothing --port 1": "nothing",
    "methods kd dkd": "dkd",
    "methods --check": "--check",
    "methods ./nowhere.py:My": "nowhere.py",
    "methods ./tiny.yaml:My": "tiny.yaml",
    "datasets --list": "--list",
    "--versions": "--versions",
    "help": "help",
}
ENVIRONMENT = (
    ("search tiny.yaml", {"HETEROKD_ROOT": "tiny.yaml"}, "HETEROKD_ROOT"),
    ("report nothing", {"HETEROKD_ROOT": "tiny.yaml"}, "HETEROKD_ROOT"),
    ("search tiny.yaml", {"HETEROKD_ROOT": "ftp://x/y"}, "ftp://x/y"),
    ("search tiny.yaml", {"HETEROKD_ROOT": "/dev/null"}, "/dev/null"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "nonsense"}, "MLFLOW_TRACKING_URI"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}, "MLFLOW_TRACKING_URI"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:port"}, "MLFLOW_TRACKING_URI"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "databricks"}, "MLFLOW_TRACKING_URI"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "file:///tmp/x"}, "MLFLOW_TRACKING_URI"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "sqlite:///tiny.yaml"}, "tiny.yaml"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "postgresql://host/x"}, "MLFLOW_TRACKING_URI"),
    ("promote nothing", {"MLFLOW_TRACKING_URI": "nonsense"}, "nothing"),
    ("rollback nothing", {"MLFLOW_TRACKING_URI": "nonsense"}, "MLFLOW_TRACKING_URI"),
    ("rollback nothing", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}, "MLFLOW_TRACKING_URI"),
    ("ui", {"MLFLOW_TRACKING_URI": "nonsense"}, "MLFLOW_TRACKING_URI"),
    ("export models:/a@b --out o", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}, "MLFLOW_TRACKING_URI"),
    ("ui", {"MLFLOW_TRACKING_URI": "http://"}, "MLFLOW_TRACKING_URI"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "sqlite://"}, "MLFLOW_TRACKING_URI"),
    ("search tiny.yaml", {"MLFLOW_TRACKING_URI": "C:\\mlruns"}, "MLFLOW_TRACKING_URI"),
)


def fifo(name: str) -> Callable[[], object]:
    return lambda: os.mkfifo(name)


def listener(name: str) -> Callable[[], object]:
    def make() -> None:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)

    return make


def loop(name: str) -> Callable[[], object]:
    return lambda: Path(name).symlink_to(name)


def dangling(name: str) -> Callable[[], object]:
    return lambda: Path(name).symlink_to("nowhere/at/all")


def zero(name: str) -> Callable[[], object]:
    return lambda: Path(name).symlink_to("/dev/zero")


def folder(name: str) -> Callable[[], object]:
    return lambda: Path(name).mkdir()


def text(name: str, content: str | bytes) -> Callable[[], object]:
    return lambda: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


SPECIAL = {"fifo": fifo, "socket": listener, "loop": loop, "dangling": dangling, "zero": zero, "folder": folder}
"""Files that are not regular files."""
AT = {
    "search.space=it": "search tiny.yaml --set search.space=it",
    "teacher.checkpoint=it": "search tiny.yaml --set teacher.checkpoint=it",
    "methods: [./it.py:My]": "search tiny.yaml --set search.space.methods=[./it.py:My]",
    "--method ./it.py:My": "distill tiny.yaml --method ./it.py:My",
    "data.dataset=./it.py:My": "search tiny.yaml --set data.dataset=./it.py:My",
    "tracking.also=[./it.py:My]": "search tiny.yaml --set tracking.also=[./it.py:My]",
    "--check ./it.py:My": "methods ./it.py:My --check",
}
"""Keys and options that name a file."""
ROOTS = ("fifo", "socket", "loop", "dangling", "zero")


def damage(file: str, content: bytes | None) -> Callable[[], object]:
    """Unpack a finished study to `runs`, and damage a file of it; None removes the file."""

    def make() -> None:
        with tarfile.open(GOLDEN / "finished.tar.xz") as archive:
            archive.extractall(".", filter="data")
        place = Path("runs") / file
        place.unlink()
        if content is not None:
            place.write_bytes(content)

    return make


STUDY = "studies/finished"
TRIAL = f"{STUDY}/trials/0002"
STUDIES = {
    f"{STUDY}/experiment.yaml": ("report finished", "compare finished", "promote finished"),
    f"{TRIAL}/recipe.yaml": ("promote finished", f"export runs/{TRIAL} --out o"),
    f"{TRIAL}/trial.json": ("compare finished",),
    f"{TRIAL}/student.safetensors": (f"export runs/{TRIAL} --out o",),
    "mlflow.db": ("rollback digits-student",),
}
"""Files of a study, and commands that need them."""
BYTES = {"empty": b"", "half": b'{"state": "compl', "binary": b"\xff\xfe\x00\x01", "list": b"[1, 2]"}


def all_cases() -> Iterator[BadInput]:
    """Yield all bad inputs."""
    for value in split(VALUES):
        key = value.partition("=")[0]
        yield BadInput("value", ("search", "tiny.yaml", "--set", value), key.partition(".")[0], title=value)
    for value in split(IN_SPACE):
        setting = f"search.space={{{value}}}"
        yield BadInput("search space", ("search", "tiny.yaml", "--set", setting), "search.space", title=value)
    for name, content in SPACE_FILES.items():
        line = "search tiny.yaml --set search.space=space.yaml"
        yield BadInput("search space file", line, "space.yaml", text("space.yaml", content), title=name)
    for value, names in OVERRIDES.items():
        yield BadInput("override", ("search", "tiny.yaml", "--set", value), names, title=repr(value))
    for name, (content, names) in METHODS.items():
        class_name = "KD" if names == "KD" else "My"
        for line in (
            f"search tiny.yaml --set search.space.methods=[./my.py:{class_name}]",
            f"distill tiny.yaml --method ./my.py:{class_name}",
        ):
            case = f"{line.split()[0]}: {name}"
            # Two texts would be the same module.
            unlike = f"{content}# {case}\n"
            yield BadInput("method file", line, names, text("my.py", unlike), title=case)
    for line, names in COMMANDS.items():
        yield BadInput("command line", line, names, title=line)
    for line, environment, names in ENVIRONMENT:
        setting = " ".join(f"{key}={value}" for key, value in environment.items())
        yield BadInput("environment", line, names, environment=environment, title=f"{setting} {line}")
    for kind, make in SPECIAL.items():
        for key, line in AT.items():
            name = "it.py" if ".py" in key else "it"
            yield BadInput("special file", line, name, make(name), title=f"{key}, a {kind}")
    for kind in ROOTS:
        for command in ("search tiny.yaml", "report nothing", "rollback nothing"):
            line = f"{command} --root it"
            yield BadInput("root", line, "it", SPECIAL[kind]("it"), title=f"{line}, a {kind}")
    for file, lines in STUDIES.items():
        for name, content in BYTES.items():
            if file == "mlflow.db" and not content:
                continue  # an empty file is an empty database
            for line in lines:
                named = Path(file).name
                yield BadInput("damaged study", line, named, damage(file, content), title=f"{line}: {named} {name}")


def split(table: str) -> list[str]:
    """Return the entries of a table of texts."""
    return [entry.strip() for line in table.strip().splitlines() for entry in line.split(" | ")]


assert sys.platform != "win32", "special files and signals of POSIX"
