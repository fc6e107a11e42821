"""The command line. Heavy imports stay inside the commands, so that `--help` answers at once.

Exit codes: 0 done, 1 a fault of ours or of the machine, 2 the user's input, 130 interrupted (everything is kept).
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from heterokd import __version__

if TYPE_CHECKING:
    from heterokd.config import Experiment
    from heterokd.export import FormatName

app = typer.Typer(
    help="Search for the best way to distil a big vision model into a small one of another architecture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

READING = ("cache", "compare", "doctor", "plan")
"""Commands that leave the root as it is; a cache that is built or pruned looks for itself."""
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a place that the user chose; the other faults of a disk are the machine's."""

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="YAML file of the experiment.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace one key, e.g. search.trials=50.")
]


def _usable(context: typer.Context, root: str) -> str:
    """Refuse a root that nothing can be written to, before there is anything to be written."""
    _check_root(root, written=context.info_name not in READING)
    return root


def _check_root(root: str, *, written: bool) -> None:
    if "://" in root:  # a store answers for itself when it is opened
        return
    place = Path(root)
    try:
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise typer.BadParameter(f"{str(place)!r} is a file; give a folder (--root or HETEROKD_ROOT)")
        if written:
            tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        if error.errno in FULL:
            raise
        raise typer.BadParameter(
            f"{str(place)!r} cannot be used ({error.strerror}); change its permissions, or give another --root"
        ) from None


RootFolder = Annotated[
    str,
    typer.Option(
        "--root",
        envvar="HETEROKD_ROOT",
        metavar="FOLDER",
        callback=_usable,
        help="Holds all state: a folder, or s3://, gs:// or file://.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object last.")]
StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study (the experiment's name).")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def search(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006  typer reads the default, nobody changes it
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; a local Ray when left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a study of the same name.")] = False,
    trials: Annotated[int | None, typer.Option(help="Trainings, instead of search.trials.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Search: train students in parallel, confirm the leaders, register the best one."""
    asked = _load(experiment, [*overrides, *([f"search.trials={trials}"] if trials is not None else [])])
    from heterokd.config import MOST_TRIALS
    from heterokd.report import metric_name, notes, show, verdict
    from heterokd.root import open_root
    from heterokd.search import search as run
    from heterokd.terminal import Terminal, leader_table

    with Terminal(asked.metric, quiet=as_json) as terminal:
        budget = asked.search.budget.limits()
        most = budget if asked.search.trials == MOST_TRIALS else f"{asked.search.trials} trials"
        terminal.say(f"{asked.name}: {most} over {', '.join(asked.methods)}")
        try:
            found = run(
                asked,
                open_root(root),
                resume=resume,
                address=address,
                listener=terminal,
                teacher_progress=terminal.teacher_epoch,
            )
        except KeyboardInterrupt:
            terminal.live.stop()
            print(
                f"\ninterrupted: everything is kept in {root.rstrip('/')}/studies/{asked.name}; "
                f"go on with: heterokd search {experiment} --resume{'' if root == 'runs' else f' --root {root}'}",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None
    summary = found.summary
    if as_json:
        model = None if found.model is None else {"name": found.model[0], "version": found.model[1]}
        _print_json({**summary, "registered": model, "report": str(found.folder.report), "tracking": found.uri})
        return
    terminal.console.print()
    terminal.console.print(leader_table(summary))
    known = found.teacher
    terminal.say(f"teacher  {known.network}: {metric_name(known.metric)} {known.val_score:.4f} on val")
    terminal.say(verdict(summary))
    standing = summary["standing"]
    if standing["failed"]:
        terminal.say(f"{standing['failed']} trial(s) failed; their tracebacks are in MLflow and in {found.folder.path}")
    for note in notes(summary):
        terminal.say(note)
    for member in summary["front"]:
        costs = ", ".join(f"{key} {member[key]:.3g}" for key in asked.search.costs)
        terminal.say(f"front    {member['student']}: {member['method']} {show(member['expected'])}, {costs}")
    terminal.say(f"page     {found.folder.report}")
    terminal.say(f"MLflow   {found.uri}   (heterokd ui)")
    if found.model is None:
        why = "no trial was trained to the end" if summary["winner"] is None else "see the warning above"
        terminal.say(f"registry nothing: {why}")
    else:
        name, version = found.model
        terminal.say(f"registry {name} version {version}, alias challenger   (next: heterokd promote {asked.name})")


@app.command()
def distill(
    experiment: ExperimentFile,
    method: Annotated[str, typer.Option(help="Name of the method; see `heterokd methods`.")],
    overrides: Overrides = [],  # noqa: B006
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Distil once: one training with the method's published settings, logged like a trial."""
    from heterokd.errors import ConfigError, did_you_mean
    from heterokd.methods import METHODS

    if method not in METHODS:
        raise ConfigError(f"--method {method}: there is no such method; {did_you_mean(method, METHODS)}")
    asked = _load(experiment, [*overrides, f"search.space={{methods: [{method}]}}"])
    from heterokd.root import open_root
    from heterokd.single import distill_once
    from heterokd.terminal import Terminal, score_text

    with Terminal(asked.metric, quiet=as_json) as terminal:

        def epoch(metrics: dict[str, float]) -> bool:
            terminal.say(
                f"epoch {int(metrics['epoch']):>3}  loss {metrics['train/loss']:.4f}  "
                f"{score_text(metrics)}  {metrics['time/images_per_second']:.0f} images/s"
            )
            return True

        trial, is_new = distill_once(asked, method, open_root(root), epoch, terminal.teacher_epoch)
    metrics = trial.status["metrics"]
    if as_json:
        _print_json({"trial": str(trial.path), "metrics": metrics, "trained": is_new, "weights": str(trial.weights)})
        return
    if not is_new:
        terminal.say("this recipe has been trained before; nothing was trained again")
    terminal.say(f"{method}: {score_text(metrics)} on val; weights in {trial.weights}")


@app.command()
def reproduce(
    experiment: ExperimentFile,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each method.")] = 3,
    methods: Annotated[str | None, typer.Option(help="Some of the methods, with commas between them.")] = None,
    overrides: Overrides = [],  # noqa: B006
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Train published settings over seeds and set the results beside the published numbers."""
    asked = _load(experiment, overrides)
    from heterokd.reproduce import reproduce as run
    from heterokd.root import open_root
    from heterokd.terminal import Terminal, reproduction_table, score_text

    chosen = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    with Terminal(asked.metric, quiet=as_json) as terminal:

        def epoch(method: str, seed: int, metrics: dict[str, float]) -> bool:
            terminal.say(
                f"{method:<10} seed {seed}  epoch {int(metrics['epoch']):>3}  {score_text(metrics)}  "
                f"{metrics['time/images_per_second']:.0f} images/s"
            )
            return True

        found = run(
            asked, open_root(root), methods=chosen, seeds=seeds, on_epoch=epoch, teacher_progress=terminal.teacher_epoch
        )
    if as_json:
        _print_json({**found.to_json(), "folder": str(found.folder.path)})
        return
    terminal.console.print()
    terminal.console.print(reproduction_table(found))
    for sentence in found.sentences():
        terminal.say(sentence)
    terminal.say(f"table    {found.folder.path / 'reproduction.csv'}")


@app.command()
def plan(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to measure on; a local Ray when left out.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Say what a search will take (time, device-hours, money, memory, disk): a few steps of each method are timed."""
    began = _began()
    asked = _load(experiment, overrides)
    from heterokd.plan import plan_experiment
    from heterokd.root import open_root
    from heterokd.terminal import Terminal, plan_lines

    with Terminal(asked.metric, quiet=as_json) as terminal:
        terminal.say(f"{asked.name}: nothing is trained now")
        found = plan_experiment(asked, open_root(root), address=address, began=began, say=terminal.say)
        if as_json:
            _print_json(found.to_json())
            return
        terminal.console.print()
        for line in plan_lines(found):
            terminal.say(line)


@app.command()
def match(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Compare the stages of teacher and student (CKA), and propose where methods that pair stages might start."""
    asked = _load(experiment, overrides)
    from heterokd.match import match as run
    from heterokd.root import open_root
    from heterokd.terminal import Terminal, match_table, score_text

    with Terminal(asked.metric, quiet=as_json) as terminal:

        def epoch(metrics: dict[str, float]) -> bool:
            terminal.say(f"student on labels alone: epoch {int(metrics['epoch']):>3}  {score_text(metrics)}")
            return True

        found = run(asked, open_root(root), on_epoch=epoch, teacher_progress=terminal.teacher_epoch)
        if as_json:
            content = {"similarity": found.similarity, "starts": found.starts, "picture": str(found.picture)}
            _print_json({**content, "student_score": found.student_score, "space": found.to_yaml()})
            return
        terminal.console.print(match_table(found.similarity))
        terminal.say(f"picture  {found.picture}")
        terminal.say("starts   (search.match_starts: true tries them; or narrow a search space to them:)")
        terminal.say(found.to_yaml().rstrip())


@app.command()
def auto(
    images: Annotated[Path, typer.Argument(metavar="IMAGES_DIR", help="A folder with a folder for each class.")],
    teachers: Annotated[list[str], typer.Option("--teacher", help="timm's name; of several the best is taken.")],
    students: Annotated[list[str], typer.Option("--student", help="timm's name; proposed when left out.")] = [],  # noqa: B006
    max_params_m: Annotated[float | None, typer.Option(min=0, help="Of a student, in millions.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0, help="Of one image on one core.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="PERIOD", help="Of the search: 30m, 2h, 1d.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the experiment and plan it, run nothing.")] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Where to write the experiment.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Look at a folder of images, write the experiment that fits it, show its plan, and run it."""
    began = _began()
    from heterokd.automatic import Limits, propose, read_hours
    from heterokd.errors import StudyError
    from heterokd.looking import look, use
    from heterokd.plan import plan_experiment
    from heterokd.root import open_root
    from heterokd.terminal import Terminal, plan_lines

    hours = None if budget is None else read_hours(budget)
    with Terminal("val/top1", quiet=as_json) as terminal:
        seen = look(images)
        for sentence in seen.sentences():
            terminal.say(sentence)
        state = open_root(root)
        folder = use(seen, state.path / "auto" / images.resolve().name)
        limits = Limits(max_params_m, max_latency_ms, hours)
        state = open_root(root)
        made = propose(
            seen,
            folder,
            teachers,
            students,
            limits,
            state,
            out,
            fitting=not dry_run,
            progress=terminal.teacher_epoch,
        )
        for sentence in made.said:
            terminal.say(sentence)
        study = state.study(made.experiment.name)
        if study.experiment_file.exists() and not dry_run:
            raise StudyError(
                f"{study.path}: the study {made.experiment.name!r} exists already; go on with it "
                f"(heterokd search {made.file} --resume), or give the folder of images another name"
            )
        terminal.say(f"experiment {made.file}")
        plan = plan_experiment(made.experiment, state, began=began, say=terminal.say)
        for line in plan_lines(plan):
            terminal.say(line)
    if not dry_run:
        search(made.file, [], None, False, None, root, as_json)
    elif as_json:
        said = [*seen.sentences(), *made.said]
        _print_json({"experiment": str(made.file), "said": said, "plan": plan.to_json()})
    else:
        print(f"run it with: heterokd search {made.file}{'' if root == 'runs' else f' --root {root}'}")


@app.command()
def teacher(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Fit the teacher, or verify the one that is given; a fitted one is reused by every search."""
    asked = _load(experiment, overrides)
    from heterokd.distillation import check_experiment, check_files, prepare_teacher
    from heterokd.report import metric_name
    from heterokd.root import open_root
    from heterokd.terminal import Terminal

    check_experiment(asked)
    check_files(asked)
    with Terminal(asked.metric, quiet=as_json) as terminal:
        prepared = prepare_teacher(asked, open_root(root), progress=terminal.teacher_epoch)
    card = prepared.card
    if as_json:
        file = None if prepared.weights is None else str(prepared.weights)
        _print_json({**card.__dict__, "file": file, "fitted": prepared.fitted})
        return
    how = "fitted now" if prepared.fitted else "ready"
    terminal.say(f"{card.network}: {metric_name(card.metric)} {card.val_score:.4f} on val, {how} ({card.source})")
    terminal.say(f"weights {prepared.weights or 'published by timm'}, SHA-256 {card.weights}")


@app.command()
def cache(
    names: Annotated[list[str], typer.Argument(metavar="EXPERIMENT | [ID]...", help="What to build, or ids.")] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to build on; a local Ray when left out.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the caches.")] = False,
    verifying: Annotated[bool, typer.Option("--verify", help="Check every byte of these caches, or of all.")] = False,
    pruning: Annotated[bool, typer.Option("--prune", help="Delete caches; one in use is kept.")] = False,
    unused_for: Annotated[str | None, typer.Option(metavar="PERIOD", help="Those last used longer ago: 30d.")] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The longest unused, until 10GB are left.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, delete nothing.")] = False,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Build the cache of a teacher's outputs to its end; list, verify or prune caches."""
    from heterokd.cache_command import Asked, run
    from heterokd.errors import CacheError
    from heterokd.root import open_root

    _check_root(root, written=not (listing or verifying or dry_run))
    asked = Asked(names, overrides, address, listing, verifying, pruning, unused_for, max_size, everything, dry_run)
    answer = run(asked, open_root(root), quiet=as_json)
    if as_json:
        _print_json(answer.content)
    for line in () if as_json else answer.lines:
        print(line)
    if answer.problems:
        sys.stdout.flush()
        raise CacheError("\n".join(answer.problems))


@app.command()
def report(study: StudyName, root: RootFolder = "runs", as_json: AsJson = False) -> None:
    """Write the study's page anew and say where it is."""
    from heterokd.errors import StudyError
    from heterokd.report import verdict, write_report

    folder, asked = _study(study, root)
    summary = folder.summary
    if "teacher" not in summary:
        raise StudyError(f"{folder.path}: the study has not been finished; run `heterokd search ... --resume` first")
    write_report(folder, asked, summary)
    if as_json:
        _print_json({**summary, "report": str(folder.report), "verdict": verdict(summary)})
        return
    print(verdict(summary))
    print(folder.report)


@app.command()
def compare(study: StudyName, root: RootFolder = "runs", as_json: AsJson = False) -> None:
    """Say which differences between a study's configurations are real: paired on their fresh seeds."""
    folder, asked = _study(study, root)
    from heterokd.significance import as_rows, compare_study, study_values

    values = study_values(folder, asked.metric)
    found = compare_study(folder, asked.metric, maximise=asked.maximise)
    if as_json:
        _print_json({"study": study, "metric": asked.metric, "values": values, "comparisons": as_rows(found)})
        return
    for name, own in values.items():
        print(f"{name:<24}{asked.metric} {sum(own.values()) / len(own):.4f} on {len(own)} fresh seeds")
    for one in found:
        print(one.sentence())
    if not found:
        print("There is nothing to compare: no two configurations were trained on two fresh seeds (confirmation).")


@app.command()
def promote(
    study: StudyName,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the decision, change nothing.")] = False,
    alias: Annotated[str, typer.Option(help="Alias of the model in use.")] = "champion",
    trial: Annotated[int | None, typer.Option(min=0, help="Another trial of the study than its winner.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Open the test split, compare the study's best student with the champion, and move the alias if it is better."""
    from heterokd.promotion import promote as decide
    from heterokd.root import open_root

    decision = decide(open_root(root), study, dry_run=dry_run, alias=alias, trial=trial)
    if as_json:
        print(decision.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("gate", "required", "measured", "passed"):
        table.add_column(title)
    for row in decision.table():
        table.add_row(*(str(cell) for cell in row))
    Console(highlight=False).print(table)
    print(decision.reason)


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the registered model.")],
    alias: Annotated[str, typer.Option(help="Alias of the model in use.")] = "champion",
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Take the last promotion back: the version that was champion before is champion again."""
    from heterokd.promotion import rollback as take_back
    from heterokd.root import open_root

    done = take_back(open_root(root), model, alias=alias)
    print(done.to_json() if as_json else done.reason)


@app.command()
def export(
    student: Annotated[
        str, typer.Argument(metavar="MODEL_URI", help="models:/NAME@ALIAS, studies/NAME or the folder of a trial.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    format_name: Annotated[str, typer.Option("--format", help="onnx, pt2 or safetensors.")] = "onnx",
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Write a student as a file that runs without heterokd, checked on real images against what was trained."""
    from heterokd.errors import ConfigError, did_you_mean

    if format_name not in ("onnx", "pt2", "safetensors"):  # before the imports, which take seconds
        known = ("onnx", "pt2", "safetensors")
        raise ConfigError(f"--format {format_name}: there is no such format; {did_you_mean(format_name, known)}")
    from heterokd.export import export_student, find_student
    from heterokd.root import open_root

    with find_student(open_root(root), student) as found:
        written = export_student(found, cast("FormatName", format_name), out)
    if as_json:
        _print_json({**asdict(written), "record": str(out / "export.json")})
        return
    height, width = written.image
    print(f"{'  '.join(str(out / name) for name in written.files)}  ({written.size_mb:.2f} MB)")
    print(
        f"parity   largest difference of a logit {written.parity.difference:.2g} at batch 1 and 5 "
        f"({written.parity.tolerance:.2g} allowed)"
    )
    print(
        f"latency  median {written.latency.median_ms:.2f} ms, p95 {written.latency.p95_ms:.2f} ms for an image of "
        f"{height} x {width} on one thread (the student in torch: {written.torch_latency.median_ms:.2f} ms)"
    )
    print(f"open it  {written.opened_with}")
    print(f"record   {out / 'export.json'}")


@app.command()
def doctor(
    experiment: ExperimentFile,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to look at; a local Ray when left out.")] = None,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Before a search: would every node reach the storage, the MLflow server, the data and the GPUs that it needs?"""
    asked = _load(experiment, overrides)
    from heterokd.doctor import as_json as plain
    from heterokd.doctor import examine, table
    from heterokd.root import open_root

    checks = examine(asked, open_root(root), address)
    if as_json:
        _print_json(plain(checks))
    else:
        print("\n".join(table(checks)))
    if not all(check.passed for check in checks):
        raise typer.Exit(2)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method in full.")] = None, as_json: AsJson = False
) -> None:
    """List the distillation methods, or explain one."""
    from heterokd.catalogue import describe, describe_all

    if name is None:
        rows = describe_all()
        if as_json:
            _print_json({"methods": rows})
            return
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            print(f"{row['name']:<{width}}  {row['title']}  [reads {row['teacher_needs']}]")
        return
    known = describe(name)
    if as_json:
        _print_json(known)
        return
    print(known["text"])
    print()
    for key in ("tasks", "student_needs", "teacher_needs"):
        print(f"{key}: {known[key]}")
    for parameter in known["parameters"]:
        domain = f"; searched over {parameter['domain']}" if parameter["domain"] else ""
        print(f"  {name}.{parameter['name']} = {parameter['default']}: {parameter['description']}{domain}")


@app.command()
def datasets(as_json: AsJson = False) -> None:
    """List the data sets."""
    from heterokd.datasets import DATASETS
    from heterokd.method import summary

    rows = [{"name": name, "needs_root": kind.needs_root, "text": summary(kind)} for name, kind in DATASETS.items()]
    if as_json:
        _print_json({"datasets": rows})
        return
    for row in rows:
        print(f"{row['name']:<14}{row['text']}{' Set data.root.' if row['needs_root'] else ''}")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 5000, root: RootFolder = "runs"
) -> None:
    """Serve MLflow's pages on 127.0.0.1; every study, trial and registered model is in them."""
    import socket

    from heterokd.errors import ConfigError
    from heterokd.root import open_root
    from heterokd.tracking import open_store, ui_command

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(f"--port {port}: something is listening there already; give another port")
    uri = open_store(open_root(root), None)
    argv, environment = ui_command(open_root(root), port, uri)
    print(f"http://127.0.0.1:{port}   (choose 'Model training' at the top left; stop with Ctrl-C)", flush=True)
    os.execvpe(argv[0], argv, environment)


def _began() -> float:
    """When this program was started."""
    import psutil

    return float(psutil.Process().create_time())


def _load(file: Path, overrides: list[str]) -> Experiment:
    from heterokd.config import load_experiment

    return load_experiment(file, overrides)


def _study(name: str, root: str) -> tuple[Any, Experiment]:
    from heterokd.config import load_experiment
    from heterokd.root import open_root

    folder = open_root(root).existing_study(name)
    return folder, load_experiment(folder.experiment_file)


def _print_json(content: object) -> None:
    print(json.dumps(content, default=str))


def main() -> None:
    """Run the command line; every foreseen fault ends in one sentence."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from heterokd.errors import HeterokdError, UserError

        if isinstance(error, HeterokdError):
            lines, is_users = str(error).splitlines(), isinstance(error, UserError)
        elif isinstance(error, OSError) and error.filename is not None and error.errno in REFUSED:
            advice = "look at what lies there and at its permissions"
            lines, is_users = [f"{os.fsdecode(error.filename)}: cannot be used ({error.strerror}); {advice}"], True
        elif isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS, errno.EACCES):
            lines, is_users = str(error).splitlines(), False
        else:
            raise
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2 if is_users else 1)
