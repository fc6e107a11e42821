"""The command line: exit codes, sentences, JSON, and what is not done twice. Searches are tried in test_search.py."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from command_line import Done, Run
from safetensors.torch import load_file, save_file

from heterokd import __version__
from heterokd.cli import listing
from heterokd.cli.app import main
from heterokd.cli.collection import RARE
from heterokd.datasets import DATASETS
from heterokd.errors import ConfigError
from heterokd.methods import METHODS
from heterokd.networks.network import build_network
from heterokd.networks.weights import save_weights

Write = Callable[..., Path]
COMMANDS = (
    "search",
    "distill",
    "reproduce",
    "teacher",
    "cache",
    "report",
    "compare",
    "promote",
    "methods",
    "datasets",
    "match",
    "auto",
    "init",
    "plan",
    "ui",
)
HEAVY = ("torch", "timm", "ray", "optuna", "mlflow", "sklearn", "pydantic")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root for the trainings of this module: they share the fitted teacher."""
    return tmp_path_factory.mktemp("state") / "runs"


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=" ".join)
def test_help(cli: Run, command: tuple[str, ...]) -> None:
    done = cli(*command, "--help")
    assert done.code == 0
    assert "Usage:" in done.out
    assert "--help" in done.out
    assert cli(*command, "-h").out == done.out


def test_every_command_is_explained(cli: Run) -> None:
    done = cli("--help")
    assert all(f"\n  {command} " in done.out for command in COMMANDS)
    assert cli().code == 2
    assert cli("--version").out.strip() == cli("-V").out.strip() == __version__
    assert "Exit codes: 0 success" in done.out


def test_nothing_is_collected_at_the_end_of_a_command() -> None:
    """What was registered before the command runs after it; the libraries' objects are exempt then."""
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"
    code += "from heterokd.cli.app import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) > 10_000


def test_threads_of_torch_do_not_wait_in_a_busy_loop() -> None:
    """OpenMP reads its settings when torch is imported, after the command line has set them; a user's setting stays."""
    code = "from heterokd.cli.app import main\ntry: main(['--version'])\nexcept SystemExit: import torch"
    environment = {**os.environ, "OMP_DISPLAY_ENV": "TRUE"}
    for asked, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment.pop("OMP_WAIT_POLICY", None)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment | asked, capture_output=True, text=True, check=True)
        assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_completed(shell: str) -> None:
    typed = {"COMP_WORDS": "heterokd re", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "heterokd re"}
    environment = {**os.environ, **typed, "_HETEROKD_COMPLETE": f"complete_{shell}"}
    if shell == "fish":
        environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    program = str(Path(sys.executable).with_name("heterokd"))
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert "reproduce" in done.stdout
    assert "report" in done.stdout
    assert "search" not in done.stdout.split("reproduce")[0]


def completions(typed: str, folder: Path) -> list[str]:
    """What bash offers for the last of the typed words."""
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_HETEROKD_COMPLETE": "complete_bash"}
    environment = {**os.environ, **words}
    environment.pop("HETEROKD_ROOT", None)
    program = str(Path(sys.executable).with_name("heterokd"))
    return subprocess.run(
        [program], env=environment, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.split()


def test_studies_and_methods_are_completed(tmp_path: Path) -> None:
    for root, name in (("runs", "birds"), ("runs", "cats"), ("other", "bees")):
        folder = tmp_path / root / "studies" / name
        folder.mkdir(parents=True)
        (folder / "experiment.yaml").touch()
    (tmp_path / "runs/studies/no-study").mkdir()
    assert completions("heterokd promote ", tmp_path) == ["birds", "cats"]
    assert completions("heterokd report --root other b", tmp_path) == ["bees"]
    assert completions("heterokd distill x.yaml --method hc", tmp_path) == ["hcd"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from heterokd.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_collector_runs_rarely_but_in_commands_that_train() -> None:
    commands, before = typer.Typer(), gc.get_threshold()
    seen: dict[str, tuple[int, ...]] = {}

    @commands.command("plan")
    def _() -> None:
        seen["plan"] = gc.get_threshold()
        raise ConfigError("no")

    @commands.command("teacher")
    def _() -> None:
        seen["teacher"] = gc.get_threshold()

    with pytest.raises(SystemExit):
        main(["plan"], commands)
    assert gc.get_threshold() == before
    with pytest.raises(SystemExit):
        main(["teacher"], commands)
    assert seen == {"plan": RARE, "teacher": before}


def test_the_installed_command_answers_a_users_fault_in_one_sentence(tmp_path: Path, tiny_file: Write) -> None:
    file = tiny_file()
    program = Path(sys.executable).parent / "heterokd"
    arguments = ["search", str(file), "--set", "training.epochs=many"]
    environment = {**os.environ, "HETEROKD_ROOT": str(tmp_path / "elsewhere")}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --set training.epochs=many: expected a whole number, got 'many'\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", "tiny.yml"], "did you mean 'tiny.yaml'?"),
        (["search", "tiny.yaml", "--set", "search.trails=3"], "did you mean 'trials'?"),
        (["search", "tiny.yaml", "--trials", "0"], "--set search.trials=0: must be at least 1"),
        (["search", "tiny.yaml", "--set", "training.workers=[4, 2]"], "workers: expected [minimum, maximum]"),
        (["search", "tiny.yaml", "--set", "training.workers=99"], "are too few for 99 workers"),
        (["search", "tiny.yaml", "--set", "teacher.network=test_vitt"], "did you mean 'test_vit'?"),
        (["search", "tiny.yaml", "--set", "teacher.checkpoint=no.safetensors"], "teacher.checkpoint: there is no file"),
        (["search", "tiny.yaml", "--set", "search.space={overrides: {fbt.back_stage: 9}}"], "9 is impossible"),
        (["distill", "tiny.yaml", "--method", "hdc"], "--method hdc: there is no such method; did you mean 'hcd'?"),
        (["distill", "tiny.yaml", "--method", "kd, hcd"], "--method kd, hcd: there is no such method"),
        (["distill", "tiny.yaml", "--method", "kd", "--set", "data.dataset=digit"], "did you mean 'digits'?"),
        (["distill", "tiny.yaml", "--method", "kd", "--set", "student.network=resnet_18"], "did you mean 'resnet18'?"),
        (["teacher", "tiny.yaml", "--set", "teacher.network=test_vitt"], "did you mean 'test_vit'?"),
        (
            ["teacher", "tiny.yaml", "--set", "teacher.checkpoint=no.safetensors"],
            "teacher.checkpoint: there is no file",
        ),
        (["report", "tiny"], "there is no study 'tiny'; start one with"),
        (["promote", "tiny"], "there is no study 'tiny'; start one with"),
        (["methods", "hdc"], "did you mean 'hcd'?"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-1:]) if isinstance(value, list) else "",
)
def test_a_users_fault_ends_in_2_and_leaves_nothing(
    cli: Run, tiny_file: Write, tmp_path: Path, arguments: list[str], says: str
) -> None:
    tiny_file()
    done = cli(*arguments)
    assert done.code == 2
    assert says in done.err
    assert all(line.startswith("error: ") for line in done.err.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    "arguments", [["searhc"], ["search"], ["distill", "tiny.yaml"], ["ui", "--port", "0"], ["report"]]
)
def test_a_command_that_is_not_one(cli: Run, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.code == 2
    assert "Usage:" in done.err
    assert "Traceback" not in done.err


def test_a_root_that_is_a_file(cli: Run, tiny_file: Write) -> None:
    done = cli("teacher", tiny_file(), "--root", "tiny.yaml")
    assert done.code == 2
    assert "'tiny.yaml' is a file" in done.err


def test_methods(cli: Run) -> None:
    listed = cli("methods")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()] == list(METHODS)
    rows = cli("methods", "--json").last["methods"]
    assert [row["name"] for row in rows] == list(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_one_method(cli: Run, method: str) -> None:
    known = cli("methods", method, "--json").last
    fields = METHODS[method].Params.model_fields
    assert known["class"] == METHODS[method].__name__
    assert {row["name"]: row["default"] for row in known["parameters"]} == {
        name: field.default for name, field in fields.items()
    }
    assert all(row["description"] for row in known["parameters"])
    text = cli("methods", method).out
    assert all(f"{method}.{name} = " in text for name in fields)


def test_datasets(cli: Run) -> None:
    rows = cli("datasets", "--json").last["datasets"]
    assert [row["name"] for row in rows] == list(DATASETS)
    assert [line.split()[0] for line in cli("datasets").out.splitlines()] == list(DATASETS)


@pytest.mark.thorough
def test_a_teacher_is_fitted_once(cli: Run, tiny_file: Write, runs: Path) -> None:
    first = cli("teacher", tiny_file(), "--root", runs, "--json")
    assert first.code == 0, first.err
    again = cli("teacher", tiny_file(), "--root", runs, "--json").last
    assert first.last["fitted"]
    assert {**first.last, "fitted": False} == again
    assert Path(again["file"]).is_file()
    said = cli("teacher", tiny_file(name="another"), "--root", runs)
    assert "ready" in said.out
    assert str(again["file"]) in said.out


@pytest.mark.thorough
def test_a_recipe_is_trained_once(cli: Run, tiny_file: Write, runs: Path) -> None:
    def distill(*more: str) -> Done:
        done = cli("distill", tiny_file(), "--method", "kd", "--root", runs, "--set", "training.epochs=2", *more)
        assert done.code == 0, done.err
        return done

    first = distill("--json").last
    assert first["trained"]
    weights = Path(first["weights"])
    written = weights.stat().st_mtime_ns
    assert {**first, "trained": False} == distill("--json").last
    assert "already trained; nothing to do" in distill().out
    assert weights.stat().st_mtime_ns == written
    other = distill("--set", "search.space.overrides.kd.temperature=4.0", "--json").last
    assert other["trained"]
    assert other["trial"] != first["trial"]


@pytest.mark.thorough
def test_json_is_all_that_stands_on_stdout(tiny_file: Write, runs: Path) -> None:
    command = [sys.executable, "-c", "from heterokd.cli.app import main; main()", "distill", str(tiny_file()), "--json"]
    command += ["--method", "scratch", "--set", "training.epochs=1", "--root", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Done(0, done.stdout, "").last["trained"]
    assert "Traceback" not in done.stderr


def test_an_unknown_study_names_the_nearest(cli: Run, tiny_file: Write, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "studies" / "digits"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(tiny_file(name="digits").read_text())
    for command in ("report", "promote"):
        done = cli(command, "digit")
        assert done.code == 2
        assert "there is no study 'digit'; did you mean 'digits'?" in done.err
    unfinished = cli("report", "digits")
    assert unfinished.code == 2
    assert "no trial has finished" in unfinished.err


def test_a_port_in_use(cli: Run, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("ui", "--port", port)
    assert done.code == 2
    assert f"--port {port}: " in done.err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny experiment's teacher, untrained."""
    file = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_weights(build_network("test_vit", 10, {"img_size": 32, "patch_size": 8}), file)
    return file


def truncated(source: Path, file: Path) -> None:
    file.write_bytes(source.read_bytes()[:-1000])


def of_another_network(source: Path, file: Path) -> None:
    save_weights(build_network("test_resnet", 10), file)


def with_other_classes(source: Path, file: Path) -> None:
    save_weights(build_network("test_vit", 7, {"img_size": 32, "patch_size": 8}), file)


def with_a_key_less(source: Path, file: Path) -> None:
    tensors = load_file(source)
    del tensors["pos_embed"]
    save_file(tensors, file)


def pickled(source: Path, file: Path) -> None:
    torch.save(load_file(source), file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, "damaged or not a safetensors file"),
        (of_another_network, "are not of network 'test_vit'"),
        (with_a_key_less, "'pos_embed' is missing"),
    ],
)
def test_a_checkpoint_that_is_not_the_teachers(
    cli: Run,
    tiny_file: Write,
    tmp_path: Path,
    weights: Path,
    damage: Callable[[Path, Path], None],
    says: str,
) -> None:
    file = tmp_path / "broken.safetensors"
    damage(weights, file)
    done = cli("teacher", tiny_file(), "--set", f"teacher.checkpoint={file}")
    assert done.code == 2
    assert done.err.startswith("error: teacher.checkpoint: ")
    assert str(file) in done.err
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_given_teacher_is_verified_not_fitted(cli: Run, tiny_file: Write, tmp_path: Path, weights: Path) -> None:
    file = tiny_file(teacher={"checkpoint": str(weights)})
    card = cli("teacher", file, "--json").last
    assert not card["fitted"]
    assert card["file"] == card["source"] == str(weights)
    done = cli("teacher", file, "--set", "teacher.min_score=0.99")
    assert done.code == 2
    assert "teacher.min_score requires 0.9900" in done.err
    assert f"{card['val_score']:.4f}" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_fitted_teacher_that_is_too_weak(cli: Run, tiny_file: Write, runs: Path) -> None:
    for command in (["teacher"], ["distill", "--method", "kd"]):
        asked = ("--set", "teacher.min_score=0.99", "--set", "data.seed=0")
        done = cli(*command, tiny_file(), "--root", runs, *asked)
        assert done.code == 2
        assert "teacher.min_score requires 0.9900; raise teacher.training.epochs or lower teacher.min_score" in done.err


def test_a_fitted_teacher_that_was_damaged(cli: Run, tiny_file: Write, runs: Path) -> None:
    changed = ["--set", "teacher.training.epochs=1", "--root", runs]
    file = Path(cli("teacher", tiny_file(), *changed, "--json").last["file"])
    tensors = load_file(file)
    save_file({key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}, file)
    done = cli("teacher", tiny_file(), *changed)
    assert done.code == 2
    assert f"move {file.parent} away" in done.err


def test_a_fault_of_ray_or_the_machine_is_a_sentence_and_debug_shows_its_traceback(cli: Run) -> None:
    from ray.exceptions import RaySystemError

    errors = {"lost": RaySystemError("the store is gone"), "broken": OSError(5, "Input/output error")}
    commands = typer.Typer()

    @commands.command()
    def fail(name: str) -> None:
        raise errors[name]

    commands.command()(listing.datasets)
    done = cli("fail", "lost", commands=commands)
    assert done.code == 1
    assert done.err == (
        "error: Ray failed (RaySystemError: System error: the store is gone); run the command again, with --debug to "
        "see the traceback\n"
    )
    shown = cli("fail", "lost", "--debug", commands=commands)
    assert shown.code == 1
    assert shown.err.startswith("Traceback (most recent call last)")
    assert shown.err.endswith(done.err)
    assert "the machine failed (OSError: [Errno 5] Input/output error)" in cli("fail", "broken", commands=commands).err
    with pytest.raises(KeyError, match="a bug"):
        main(["fail", "a bug"], commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_debug(cli: Run, command: str) -> None:
    assert "--debug " in cli(command, "--help").out


def test_an_interrupted_fit_of_a_teacher_says_what_there_is(
    cli: Run, tiny_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heterokd.execution import driver

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "prepare_teachers", interrupted)
    tiny_file()
    done = cli("search", "tiny.yaml")
    assert done.code == 130
    assert done.err.splitlines()[-2:] == [
        "interrupted before the first trial, so the study has no results yet",
        "continue with: heterokd search tiny.yaml --resume",
    ]
    assert not (tmp_path / "runs" / "studies").exists()
    fit = tmp_path / "runs" / "teachers" / "0123"
    fit.mkdir(parents=True)
    (fit / "checkpoint.pt").write_bytes(b"")
    again = cli("search", "tiny.yaml")
    assert again.code == 130
    assert (
        "interrupted before the first trial, so the study has no results yet; fitted teachers, and the last checkpoint "
        "of a fit, are kept in runs/teachers\n"
    ) in again.err
