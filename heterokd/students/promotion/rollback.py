"""rollback(): undo the last promotion, so that the previous champion is champion again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from filelock import FileLock
from mlflow import MlflowClient

from heterokd.errors import PromotionError, TrackingError
from heterokd.storage.typed_json import parse
from heterokd.storage.workspace import Workspace
from heterokd.students.download import find_version
from heterokd.students.promotion.aliases import (
    CHAMPION,
    LOCK,
    append_line,
    check_alias,
    described_version,
    last_line,
    lines_file,
    previous_alias,
    rolled_back_tag,
)
from heterokd.students.registry_lock import locked_model
from heterokd.tracking.store import answering, existing_store, quiet


@dataclass(frozen=True)
class Rollback:
    """The result of a rollback.

    Attributes:
        model: name of the registered model.
        alias: alias that was moved.
        champion: version that has the alias now.
        taken_back: version that had the alias before.
        changed: whether this call moved the alias.
        reason: summary in a sentence.
    """

    model: str
    alias: str
    champion: str
    taken_back: str
    changed: bool
    reason: str

    def to_json(self) -> str:
        """Format as a JSON object in a line."""
        return json.dumps(asdict(self))


def rollback(root: Workspace, model: str, *, alias: str = CHAMPION, uri: str | None = None) -> Rollback:
    """Give the alias back to the version that had it before the last promotion.

    Only the last promotion can be undone, and a second call changes nothing. The version that was rolled back keeps its
    tags, and is not promoted again while it has the tag `rolled_back`.

    Args:
        root: workspace, whose lock serialises rollbacks and promotions.
        model: name of the registered model, with or without `models:/`.
        alias: alias of the model in use.
        uri: URI of the tracking store; default: `MLFLOW_TRACKING_URI`, or the workspace's.

    Raises:
        TrackingError: there is no such model, no version has the alias, or the store does not answer.
        PromotionError: the alias cannot be used, or there is no earlier version.
    """
    check_alias(alias)
    name = model.removeprefix("models:/").partition("@")[0]
    uri = existing_store(root, uri)
    client = MlflowClient(uri)
    with FileLock(root.path / LOCK), answering(uri), quiet():
        find_version(client, name, alias, None)  # raises before the lock, which needs a registered model
        with locked_model(client, name):
            return _roll_back(client, root, name, alias)


def _roll_back(client: MlflowClient, root: Workspace, name: str, alias: str) -> Rollback:
    champion = find_version(client, name, alias, None)
    model = client.get_registered_model(name)
    back, tag = previous_alias(alias), rolled_back_tag(alias)
    last = parse(dict[str, str], json.loads(model.tags.get(tag, "{}")))
    try:
        previous = find_version(client, name, back, None)
    except TrackingError:
        previous = None
    if previous is None or str(previous.version) == str(champion.version):
        if last.get("to") != str(champion.version):
            raise PromotionError(
                f"models:/{name}: version {champion.version} was the first with alias {alias!r}, so there is no "
                "earlier version; promote another study, or remove the alias in `heterokd ui`"
            )
        if previous is not None:  # an earlier call was interrupted before its last step
            client.delete_registered_model_alias(name, back)
        reason = (
            f"{described_version(champion)} has been {alias} since the rollback at {last['time']}; nothing was changed"
        )
        return Rollback(name, alias, str(champion.version), last["from"], changed=False, reason=reason)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    done = Rollback(
        name,
        alias,
        str(previous.version),
        str(champion.version),
        changed=True,
        reason=f"rolled back: {described_version(previous)} is {alias} again; {described_version(champion)} no longer",
    )
    # The record first, the alias last, as in a promotion: an interrupted rollback is repeated.
    line = {"event": "rollback", **asdict(done)}
    file = lines_file(root, champion.tags)
    if {key: value for key, value in last_line(file).items() if key != "time"} != line:
        append_line(file, now, line)
    move = {"time": now, "from": done.taken_back, "to": done.champion}
    client.set_registered_model_tag(name, tag, json.dumps(move))
    client.set_model_version_tag(name, done.taken_back, tag, now)
    client.delete_model_version_tag(name, done.champion, key=tag)
    client.set_registered_model_alias(name, alias, done.champion)
    client.delete_registered_model_alias(name, back)
    return done
