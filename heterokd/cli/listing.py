"""Commands that list methods and data sets."""

from __future__ import annotations

from typing import Annotated

import typer

from heterokd.cli.options import AsJson, method_names, print_json


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Method to describe, or FILE.py:Class.", autocompletion=method_names)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the method on random pairs; exit with 2 on a fault.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the distillation methods, or describe or check a method."""
    from heterokd.cli.catalogue import describe, describe_all, learned_unlabelled, named_method, source_of
    from heterokd.errors import ConfigError

    if check:
        if name is None:
            raise ConfigError("--check: the method is missing; write heterokd methods ./my_method.py:MyKD --check")
        from heterokd.methods.conformance.checks import check_method

        problems = check_method(named_method(name)[1])
        if as_json:
            print_json({"method": name, "problems": problems})
        for problem in () if as_json else problems or ["all checks passed"]:
            print(problem)
        raise typer.Exit(2 if problems else 0)

    if name is None:
        rows = describe_all()
        if as_json:
            print_json({"methods": rows})
            return
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            print(f"{row['name']:<{width}}  {row['title']}  [reads {row['teacher_needs']}]")
        return
    known = describe(name)
    if as_json:
        print_json(known)
        return
    print(known["text"])
    print()
    print(f"source: {source_of(known['text'])}")
    print(f"tasks: {known['tasks']}")
    print(f"student_needs: {known['student_needs']}")
    print(f"teacher_needs: {known['teacher_needs']}")
    print(f"learned from images without labels: {learned_unlabelled(name)}")
    for parameter in known["parameters"]:
        domain = f"; domain {parameter['domain']}" if parameter["domain"] else ""
        print(f"  {known['name']}.{parameter['name']} = {parameter['default']}: {parameter['description']}{domain}")


def datasets(as_json: AsJson = False) -> None:
    """List the data sets."""
    from heterokd.datasets import DATASETS
    from heterokd.method import summary

    rows = [{"name": name, "needs_root": kind.needs_root, "text": summary(kind)} for name, kind in DATASETS.items()]
    if as_json:
        print_json({"datasets": rows})
        return
    for row in rows:
        print(f"{row['name']:<14}{row['text']}{' Needs data.root.' if row['needs_root'] else ''}")
