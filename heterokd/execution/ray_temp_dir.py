"""Folder of a local Ray's sessions, short enough for its sockets; imports no Ray."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from heterokd.errors import ConfigError

SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket in bytes, without the final zero."""

SESSION_BYTES = len("/session_2026-01-31_23-59-59_999999_4194304/sockets/dash_TaskEventsHead")
"""Longest path of a socket below Ray's temporary folder: date, process id, and the dashboard's longest module name."""

SHORT = ("/tmp/ray", f"/tmp/ray-{os.getuid()}", "/var/tmp/ray", "/dev/shm/ray")
"""Folders to use instead; the first is Ray's default without TMPDIR."""

logger = logging.getLogger(__name__)


def ray_temp_dir(environment: Mapping[str, str] = os.environ, instead: Sequence[str] = SHORT) -> str | None:
    """Return the temporary folder for a local Ray; None if Ray's default works.

    Ray uses `RAY_TMPDIR` or `TMPDIR` also if the paths of its sockets become too long, or the folder cannot be written.

    Args:
        environment: environment variables.
        instead: absolute folders to use instead, the best first.

    Raises:
        ConfigError: no folder can be used.
    """
    variable, default = _default(environment)
    if _fits(default):
        return None
    for folder in instead:
        if _fits(folder):
            if variable is not None:
                logger.info("%s=%s is not usable for Ray's sockets; using %s", variable, environment[variable], folder)
            return folder
    raise ConfigError(
        f"{variable or 'TMPDIR'}: Ray needs a writable folder of at most {SOCKET_BYTES - SESSION_BYTES - len('/ray')} "
        f"bytes for its sockets, and neither {Path(default).parent} nor {', '.join(instead)} is one; set RAY_TMPDIR "
        "to such a folder"
    )


def sessions_folder(environment: Mapping[str, str] = os.environ) -> str:
    """Return the folder below which a local Ray writes its sessions and logs, for messages."""
    return ray_temp_dir(environment) or _default(environment)[1]


def _default(environment: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the variable that sets Ray's temporary folder, or None, and the folder."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in environment), None)
    return variable, SHORT[0] if variable is None else os.path.join(environment[variable], "ray")


def _fits(folder: str) -> bool:
    """Whether a folder's path is absolute and short enough, and the folder can be written or made."""
    if not os.path.isabs(folder) or len(os.fsencode(folder)) + SESSION_BYTES > SOCKET_BYTES:
        return False
    place = Path(folder)
    try:
        while not place.exists():
            place = place.parent
        # Not os.access: it answers yes to root, also where nothing can be written.
        tempfile.TemporaryFile(dir=place).close()
    except OSError:
        return False
    return True
