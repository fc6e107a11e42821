"""Every name that we accept goes through MLflow's store and registry, Optuna's database and the file system."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import fabricated
import optuna
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import _parse_model_uri
from optuna.storages import RDBStorage
from pydantic import ValidationError

from heterokd.config.names import LONGEST_ALIAS, LONGEST_NAME, alias_fault, model_name_fault, text_fault
from heterokd.config.services import TrackingSettings
from heterokd.errors import ConfigError, PromotionError
from heterokd.storage.sqlite_url import sqlite_url
from heterokd.storage.workspace import open_workspace
from heterokd.students.download import find_version
from heterokd.students.promotion.aliases import check_alias, previous_alias, rolled_back_tag
from heterokd.students.promotion.record import decision_tag
from heterokd.tracking.store import current, open_store

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30) | st.text(
    "ab ._-;=&'\"`$()[]{}<>|*+~^", min_size=1
)
FEW = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return open_store(fabricated.root_with_store(tmp_path_factory.mktemp("names")), None)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> RDBStorage:
    return RDBStorage(sqlite_url(tmp_path_factory.mktemp("studies") / "study.db"))


@FEW
@given(NAMES)
@example("x" * LONGEST_NAME)
@example("ä" * LONGEST_NAME)
@example("digits; DROP TABLE x --  $HOME {x} [y] <z> ~")
@example("名前")
@example("latest")
@example("m-0123456789abcdef0123456789abcdef")
def test_an_accepted_model_goes_through_the_registry(store: str, name: str) -> None:
    assume(model_name_fault(name) is None)
    client = MlflowClient(store)
    with current(store):
        with suppress(MlflowException):  # an example comes twice; a refused name fails at the next line
            client.create_registered_model(name, tags={"dataset": "digits"})
        version = client.create_model_version(name, "file:///nowhere", tags={"study": name})
        client.set_registered_model_alias(name, "champion", version.version)
        found = client.search_model_versions(f"name = '{name}'")
        assert {(known.name, known.tags["study"]) for known in found} == {(name, name)}
        assert find_version(client, name, "champion", None).version == version.version
    assert _parse_model_uri(f"models:/{name}@champion")[1:] == (name, None, None, "champion")
    assert _parse_model_uri(f"models:/{name}/1")[1:] == (name, "1", None, None)


@FEW
@given(NAMES)
@example("x" * LONGEST_NAME)
@example("o'brien/digits: a?b %20 #1 ..")
def test_an_accepted_experiment_goes_through_the_store(store: str, name: str) -> None:
    assume(text_fault(name) is None)
    assert TrackingSettings(experiment=name).experiment == name
    client = MlflowClient(store)
    found = client.get_experiment_by_name(name)
    number = client.create_experiment(name) if found is None else found.experiment_id
    assert client.get_experiment_by_name(name).experiment_id == number
    client.set_experiment_tag(number, "mlflow.note.content", name)
    run = client.create_run(number, run_name=name, tags={"heterokd.study": name})
    assert client.get_run(run.info.run_id).data.tags["heterokd.study"] == name


@FEW
@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
@example("0" * 64)
@example("a..")
@example("CON.")
def test_an_accepted_study_goes_through_all_of_them(
    studies: RDBStorage, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    question = fabricated.experiment(name, tracking={})
    for derived in (name, question.registered_model, question.experiment_name):
        assert model_name_fault(derived) is None
    folder = tmp_path_factory.mktemp("studies") / name
    folder.mkdir()
    assert [path.name for path in folder.parent.iterdir()] == [name]
    optuna.create_study(study_name=name, storage=studies, load_if_exists=True)
    assert optuna.load_study(study_name=name, storage=studies).study_name == name


@FEW
@given(st.from_regex(r"[\w-]{1,20}", fullmatch=True))
@example("x" * LONGEST_ALIAS)
@example("v1")
@example("Latest")
@example("v1\n")
def test_an_accepted_alias_goes_through_the_registry(store: str, alias: str) -> None:
    if alias_fault(alias) is not None:
        with pytest.raises(PromotionError, match="--alias: expected"):
            check_alias(alias)
        return
    client = MlflowClient(store)
    with current(store):
        with suppress(MlflowException):  # there since the first example
            client.create_registered_model("of-aliases")
            client.create_model_version("of-aliases", "file:///nowhere")
        for name in (alias, previous_alias(alias)):
            client.set_registered_model_alias("of-aliases", name, "1")
            assert find_version(client, "of-aliases", name, None).version == 1
        for tag in (decision_tag(alias), rolled_back_tag(alias)):
            client.set_model_version_tag("of-aliases", "1", tag, "x")


REFUSED = [
    "o'brien",
    "..",
    ".",
    "a?b",
    "x" * 600,
    "a/b",
    "a:b",
    "a@b",
    "a%20b",
    "a#b",
    " a",
    "a ",
    "",
    " ",
    "a\nb",
    "\x00",
]
REFUSED += ["a\u2028b", 'a"b', "a`b", "a\\b", "\ud800"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_fail_later_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="expected "):
        TrackingSettings(registered_model=name)


@pytest.mark.parametrize("name", ["x" * 600, " a", "", "a\nb", "\x7f"])
def test_an_experiment_that_would_fail_later_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="expected "):
        TrackingSettings(experiment=name)


@pytest.mark.parametrize("alias", ["challenger", "previous", "previous-x", "latest", "v3", "a b", "a/b", "", "x" * 300])
def test_an_alias_that_would_fail_later_is_refused(alias: str) -> None:
    with pytest.raises(PromotionError, match="--alias: expected"):
        check_alias(alias)


@pytest.mark.parametrize("root", ["a\nb", os.fsdecode(b"a\xff"), "/" + "x" * 200 + ("/" + "y" * 200) * 9, "ä/" * 300])
def test_a_root_that_databases_cannot_hold_is_refused(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--root ") as caught:
        open_workspace(root)
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode()
