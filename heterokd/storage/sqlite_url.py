"""URLs of SQLite files, for paths with any characters."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

_RESERVED = {character: quote(character, safe="") for character in "%?{}"}
"""Characters that mean something else in a URL: SQLAlchemy decodes `%XX` and splits at `?`, Optuna formats `{}`."""


def sqlite_url(file: Path, *, read_only: bool = False) -> str:
    """Return SQLAlchemy's URL of a SQLite file; a relative path stays relative unless `read_only`.

    >>> sqlite_url(Path("/data/a?b/study.db"))
    'sqlite:////data/a%3Fb/study.db'
    """
    if not read_only:
        return f"sqlite:///{_quoted(str(file))}"
    # SQLite itself decodes the name of a `file:` URI, after SQLAlchemy has decoded the URL.
    return f"sqlite:///{_quoted(sqlite_file_uri(file).partition('?')[0])}?mode=ro&uri=true"


def sqlite_file_uri(file: Path) -> str:
    """Return the URI with which `sqlite3.connect(..., uri=True)` opens a file for reading only."""
    return f"file:{quote(str(file.absolute()))}?mode=ro"


def mlflow_sqlite_uri(file: Path) -> str:
    """Return MLflow's tracking URI of a SQLite file.

    For a URL that begins with `sqlite:///`, MLflow creates the parent folder by its name in the URL, for example a
    folder `a%3Fb` next to `a?b`; the driver's name prevents that.
    """
    url = sqlite_url(file)
    return url.replace("sqlite:", "sqlite+pysqlite:", 1) if "%" in url else url


def _quoted(text: str) -> str:
    return "".join(_RESERVED.get(character, character) for character in text)
