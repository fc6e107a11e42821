"""The commands that show what was found."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from heterokd.cli.options import AsJson, RootFolder, StudyName, existing_study, print_json


def report(study: StudyName, root: RootFolder = "runs", as_json: AsJson = False) -> None:
    """Write the study's page anew and say where it is."""
    from heterokd.errors import StudyError
    from heterokd.report import verdict, write_report

    folder, asked = existing_study(study, root)
    summary = folder.summary
    if "teacher" not in summary:
        raise StudyError(f"{folder.path}: the study has not been finished; run `heterokd search ... --resume` first")
    write_report(folder, asked, summary)
    if as_json:
        print_json({**summary, "report": str(folder.report), "verdict": verdict(summary)})
        return
    print(verdict(summary))
    print(folder.report)


def compare(study: StudyName, root: RootFolder = "runs", as_json: AsJson = False) -> None:
    """Say which differences between a study's configurations are real: paired on their fresh seeds."""
    folder, asked = existing_study(study, root)
    from heterokd.significance import as_rows, compare_study, study_values

    values = study_values(folder, asked.metric)
    found = compare_study(folder, asked.metric, maximise=asked.maximise)
    if as_json:
        print_json({"study": study, "metric": asked.metric, "values": values, "comparisons": as_rows(found)})
        return
    for name, own in values.items():
        print(f"{name:<24}{asked.metric} {sum(own.values()) / len(own):.4f} on {len(own)} fresh seeds")
    for one in found:
        print(one.sentence())
    if not found:
        print("There is nothing to compare: no two configurations were trained on two fresh seeds (confirmation).")


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
