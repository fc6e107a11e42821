"""Write requirements-runtime.lock: the part of requirements.lock that heterokd needs on a cluster.

    python deploy/runtime_lock.py > requirements-runtime.lock

Development tools are left out. The needs are followed through the metadata of the installed packages, beginning with
heterokd's own, and the versions are those of requirements.lock. Run it in an environment of requirements.lock
(`make install`) whenever that file changes; tests/test_deploy.py compares both files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).parents[1]
EXTRAS = ("cluster",)
"""Extras of heterokd that a cluster needs."""

ALSO = ("setuptools",)
"""What builds heterokd without build isolation."""

ENVIRONMENTS = [
    {
        "python_version": f"3.{minor}",
        "python_full_version": f"3.{minor}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    for minor in (11, 12, 13)
]
"""Versions of Python for which the file is complete."""


def locked(file: Path = TOP / "requirements.lock") -> dict[str, str]:
    """Return the lines of a lock file by the canonical names of their packages."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return {canonicalize_name(re.split(r"[=\[;]", line)[0]): line for line in lines if line and line[0] != "#"}


def project() -> list[Requirement]:
    """Return the requirements of heterokd in pyproject.toml, with those of `EXTRAS`."""
    import tomllib

    content = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*content["dependencies"], *(line for extra in EXTRAS for line in content["optional-dependencies"][extra])]
    return [Requirement(line) for line in listed]


def needed(begin: Iterable[Requirement]) -> set[str]:
    """Follow requirements through the installed packages.

    Raises:
        PackageNotFoundError: for a package that is needed on this platform and not installed.
    """
    found: set[tuple[str, str]] = set()
    pending = [(requirement, "") for requirement in begin]
    while pending:
        requirement, extra = pending.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({**each, "extra": extra}) for each in ENVIRONMENTS):
            continue
        name = canonicalize_name(requirement.name)
        for asked in ("", *requirement.extras):
            if (name, asked) not in found:
                found.add((name, asked))
                try:
                    lines = metadata.requires(name) or []
                except metadata.PackageNotFoundError:
                    # Only an installed package states its needs: those of the machine that locks are the present ones.
                    if marker is None:
                        raise
                    continue
                pending += [(Requirement(line), asked) for line in lines]
    return {name for name, _ in found}


def runtime_lines() -> list[str]:
    """Return the lines of requirements-runtime.lock, in the order of requirements.lock."""
    names = needed(project()) | set(ALSO)
    return [line for name, line in locked().items() if name in names]


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in runtime_lines()))
