"""Commands that list methods and data sets."""

from __future__ import annotations

from typing import Annotated

import typer

from heterokd.cli.options import AsJson, print_json


def methods(
    name: Annotated[str | None, typer.Argument(help="Describe this method in full.")] = None, as_json: AsJson = False
) -> None:
    """List the distillation methods, or describe a method."""
    from heterokd.cli.catalogue import describe, describe_all

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
    for key in ("tasks", "student_needs", "teacher_needs"):
        print(f"{key}: {known[key]}")
    for parameter in known["parameters"]:
        domain = f"; searched over {parameter['domain']}" if parameter["domain"] else ""
        print(f"  {name}.{parameter['name']} = {parameter['default']}: {parameter['description']}{domain}")


def datasets(as_json: AsJson = False) -> None:
    """List the data sets."""
    from heterokd.datasets import DATASETS
    from heterokd.method import summary

    rows = [{"name": name, "needs_root": kind.needs_root, "text": summary(kind)} for name, kind in DATASETS.items()]
    if as_json:
        print_json({"datasets": rows})
        return
    for row in rows:
        print(f"{row['name']:<14}{row['text']}{' Set data.root.' if row['needs_root'] else ''}")
