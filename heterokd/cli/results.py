"""Commands that show results."""

from __future__ import annotations

import errno
import socket
import sys
import webbrowser
from typing import Annotated

import typer

from heterokd.cli.options import AsJson, RootFolder, StudyName, existing_study, print_json, study_names
from heterokd.errors import without_password


def report(
    study: StudyName,
    measure: Annotated[
        bool, typer.Option("--measure", help="Evaluate the winner on val again, for its charts.")
    ] = False,
    is_opened: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    root: RootFolder = "runs",
    as_json: AsJson = False,
) -> None:
    """Regenerate the report of a study, also during the search."""
    from heterokd.errors import StudyError
    from heterokd.report.page import write_report
    from heterokd.report.study_data import read_study
    from heterokd.report.wording import lead, verdict
    from heterokd.study.read_summary import read_summary

    folder, asked = existing_study(study, root)
    summary = read_summary(folder)
    if summary is None:
        raise StudyError(f"{folder.path}: no trial has finished, so there is nothing to report; try again later")
    if measure:
        from heterokd.report.measure import draw_pictures
        from heterokd.storage.workspace import open_workspace
        from heterokd.teachers.prepare import ready_teacher

        state = open_workspace(root)
        weights = {name: ready_teacher(asked.for_teacher(name), state)[1] for name in asked.teacher.networks}
        draw_pictures(folder, asked, state, weights)
    write_report(read_study(folder, asked), root=root)
    if is_opened and not webbrowser.open(folder.report.resolve().as_uri()):
        print(f"there is no browser here; open {folder.report}", file=sys.stderr)
    if as_json:
        print_json({**summary.to_json(), "report": str(folder.report), "verdict": verdict(summary)})
        return
    print(lead(summary))
    if summary.winner is not None:
        print(verdict(summary))
    print(folder.report)


def compare(study: StudyName, root: RootFolder = "runs", as_json: AsJson = False) -> None:
    """Test which differences in a study are significant.

    Compares configurations on their common fresh seeds, and says of each method why it did not win.
    """
    folder, asked = existing_study(study, root)
    from heterokd.cli.terminal.console import Terminal
    from heterokd.study.method_outcome import method_outcomes
    from heterokd.study.read_summary import read_summary
    from heterokd.study.significance import as_rows, compare_trials, fresh_values
    from heterokd.study.trial_view import read_trials

    trials = read_trials(folder, asked.metric)
    values, found = fresh_values(trials), compare_trials(trials, maximise=asked.maximise)
    summary = read_summary(folder)
    outcomes = {} if summary is None else method_outcomes(summary, trials)
    if as_json:
        compared = {"values": values, "comparisons": as_rows(found), "methods": outcomes}
        print_json({"study": study, "metric": asked.metric, **compared})
        return
    terminal = Terminal()
    for name, by_seed in values.items():
        mean = sum(by_seed.values()) / len(by_seed)
        terminal.print_line(f"{name:<24}{asked.metric} {mean:.4f} on {len(by_seed)} fresh seeds")
    for comparison in found:
        terminal.print_sentence(comparison.sentence())
    if not found:
        terminal.print_sentence(
            "No pair can be tested: no two configurations were confirmed on two common fresh seeds; raise "
            "search.confirm_seeds or search.confirm_share."
        )
    for method, outcome in outcomes.items():
        terminal.print_sentence(f"{method}: {outcome}.")


def ui(
    study: Annotated[
        str | None,
        typer.Argument(metavar="STUDY", help="Print only the links of this study.", autocompletion=study_names),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000,
    live: Annotated[
        bool, typer.Option("--live", help="Serve the page of STUDY instead, which follows the search.")
    ] = False,
    root: RootFolder = "runs",
) -> None:
    """Serve MLflow's UI on 127.0.0.1.

    Prints links to the trials, the comparison chart and the model of each study. With --live, serves the study's page,
    which reloads itself while the search runs: curves, leaders, running trials and the last decisions.
    """
    _check_port(port)  # before the imports, which take seconds
    if live:
        _serve_live(study, port, root)
        return
    from heterokd.storage.workspace import open_workspace
    from heterokd.tracking.store import existing_store
    from heterokd.tracking.ui_server import serve, ui_command
    from heterokd.tracking.ui_views import study_links

    state = open_workspace(root)
    uri = existing_store(state, None if study is None else existing_study(study, root)[1].tracking.uri)
    if uri.startswith("http"):
        # The browser asks for the password.
        _print_links(study_links(state, uri, without_password(uri).replace("***@", ""), study))
        return
    base = f"http://127.0.0.1:{port}"
    links = study_links(state, uri, base, study)
    argv, environment = ui_command(state, port, uri)
    try:
        serve(argv, environment, port, state.path / "ui.log", lambda: _print_links(links))
    except KeyboardInterrupt:
        print("stopped")


def _serve_live(study: str | None, port: int, root: str) -> None:
    from heterokd.errors import ConfigError
    from heterokd.report.live import LivePage, live_server

    if study is None:
        raise ConfigError("--live: name the study whose page is to be served, such as `heterokd ui quickstart --live`")
    folder, asked = existing_study(study, root)
    with live_server(LivePage(folder, asked, root), port) as server:
        print(f"page  http://127.0.0.1:{port}/\nPress Ctrl-C to stop.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def _print_links(links: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, link in links if link)
    for name, link in links:
        print(f"{name:<{width}}  {link}".rstrip())
    print("If MLflow opens an assistant's panel or a hint, close it. Press Ctrl-C to stop.", flush=True)


def _check_port(port: int) -> None:
    from heterokd.errors import ConfigError

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = "the port is in use; give another port"
            else:
                reason = f"the system refuses it ({error.strerror}); give a port from 1024 on"
            raise ConfigError(f"--port {port}: {reason}") from None
