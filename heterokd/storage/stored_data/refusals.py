"""Errors of a store as sentences, for the key `data.root` and the option `--root`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from pyarrow import fs

from heterokd.errors import ConfigError, DataError
from heterokd.storage.filesystem import RemoteDir

DENIED = (
    *("ACCESS_DENIED", "403", "credentials", "InvalidAccessKeyId", "SignatureDoesNotMatch", "401", "Unauthorized"),
    "OAuth2",
)
"""Parts of a store's messages that name missing or wrong credentials."""


@contextmanager
def refused(url: str, hint: str = "") -> Iterator[None]:
    """Raise errors of a store as a `DataError` that says what to do.

    Args:
        url: where the data set lies.
        hint: what else to know.

    Raises:
        DataError: the store refused, or did not answer.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise  # of this machine's disk
        raise DataError(f"data.root: {url}: {refusal(url, error)}{hint and f'; {hint}'}") from None


def refusal(url: str, error: OSError) -> str:
    """Return what an error of a store means, and what to do."""
    reason = " ".join(str(error).split()).partition(". The request was not sent")[0]
    advice = "check the address, and that this machine reaches it"
    has_none = urlsplit(url).scheme == "s3" and "AWS_ACCESS_KEY_ID" not in os.environ  # perhaps it has a role
    if has_none or any(part in reason for part in DENIED):
        advice = f"{_credentials(url)}, with the right to read it"
    return f"cannot be read ({reason}); {advice}"


def empty_reason(store: RemoteDir, url: str) -> DataError:
    """Return the error for a root without files.

    Raises:
        OSError: the store did not answer.
    """
    bucket = store.path.partition("/")[0]
    if store.local is None and store.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
        return DataError(f"data.root: {url}: there is no bucket {bucket!r}; correct the address")
    what = "there are no files below it" if store.local is None or store.local.is_dir() else "there is no such folder"
    return DataError(f"data.root: {url}: {what}; correct the address, or run `heterokd data push`")


def check_store(store: RemoteDir, url: str) -> None:
    """Ask a store whether it answers, before work begins.

    Raises:
        ConfigError: it does not answer, refuses this machine's credentials, or has no such bucket.
    """
    bucket = store.path.partition("/")[0]
    try:
        store.stat("studies")
        # Whether a bucket exists needs a right of its own in Google's storage.
        exists = urlsplit(url).scheme != "s3" or store.filesystem.get_file_info(bucket).type != fs.FileType.NotFound
    except OSError as error:
        raise ConfigError(f"--root {url}: {refusal(url, error)}") from None
    if not exists:
        raise ConfigError(f"--root {url}: there is no bucket {bucket!r}; create it, or correct the address")


def _credentials(url: str) -> str:
    if urlsplit(url).scheme == "s3":
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"
    return "set GOOGLE_APPLICATION_CREDENTIALS, or give this machine a service account"
