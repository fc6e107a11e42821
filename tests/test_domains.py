"""Domains: what they hold, how they are written, and what cannot be one."""

from __future__ import annotations

import math
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from heterokd.domains import Choice, Domain, Float, Int, domains, read_domain
from heterokd.errors import ConfigError
from heterokd.methods import METHODS


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (Float(1, 8), [1, 1.0, 3.5, 8], [0.999, 8.001, True, "3", None, math.nan, math.inf]),
        (Float(0.1, 10, log=True), [0.1, 10.0], [0, 11]),
        (Float(2, 2), [2, 2.0], [1, 3]),
        (Int(0, 4), [0, 4], [-1, 5, 2.0, True, "2", None]),
        (Int(3, 3), [3], [2]),
        (Choice(1, 2, 4), [1, 4, 4.0], [3, True, "1", None]),
        (Choice(True, False), [True, False], [1, 0, "True", None]),
        (Choice(0, False), [0, False], [1, True]),
        (Choice("a", None), ["a", None], ["b", 0, ""]),
    ],
    ids=str,
)
def test_what_a_domain_holds(domain: Domain, inside: list[Any], outside: list[Any]) -> None:
    assert [value for value in inside if value not in domain] == []
    assert [value for value in outside if value in domain] == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Float(8, 1), "`low <= high` must hold, got low=8, high=1"),
        (lambda: Int(2, 1), "`low <= high` must hold"),
        (lambda: Float(0, 1, log=True), "needs `low > 0`, got low=0"),
        (lambda: Int(0, 8, log=True), "needs `low > 0`"),
        (lambda: Float(-1, 1, log=True), "needs `low > 0`"),
        (lambda: Float(math.nan, 1), "must be finite"),
        (lambda: Float(0, math.inf), "must be finite"),
        (lambda: Choice(), "at least one value"),
        (lambda: Choice(1, 1), "must differ"),
        (lambda: Choice(1, 1.0), "must differ"),
        (lambda: Choice([1], 2), "an option is a number, a word, true or false, got [1]"),  # type: ignore[arg-type]
        (lambda: Choice(math.nan), "an option is a number"),
    ],
)
def test_what_cannot_be_a_domain(make: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("value", "like", "domain"),
    [
        ({"low": 1, "high": 8}, None, Int(1, 8)),
        ({"low": 1, "high": 8}, Int(0, 9), Int(1, 8)),
        ({"low": 1, "high": 8}, Float(0.1, 10), Float(1.0, 8.0)),
        ({"low": 1, "high": 8.0}, None, Float(1.0, 8.0)),
        ({"low": 1, "high": 8}, Float(0.1, 10, log=True), Float(1.0, 8.0, log=True)),
        ({"low": 1, "high": 8, "log": False}, Float(0.1, 10, log=True), Float(1.0, 8.0)),
        ({"low": 1e-3, "high": 0.5, "log": True}, None, Float(1e-3, 0.5, log=True)),
        ({"low": 1, "high": 64, "log": True}, None, Int(1, 64, log=True)),
        ({"low": 1, "high": 8}, Choice(1, 2), Int(1, 8)),
        ({"options": [1, 2, 4]}, Int(1, 9), Choice(1, 2, 4)),
        ({"options": [True, "a", None, 0.5]}, None, Choice(True, "a", None, 0.5)),
        (4.0, Float(1, 8), Choice(4.0)),
        (False, None, Choice(False)),
        (None, None, Choice(None)),
        ("paper", None, Choice("paper")),
    ],
)
def test_domains_as_search_spaces_write_them(value: Any, like: Domain | None, domain: Domain) -> None:
    found = read_domain(value, "here", like)
    assert found == domain
    assert type(found) is type(domain)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        [1, 2],
        {"low": 1},
        {"high": 1},
        {"low": 1, "high": 2, "step": 1},
        {"low": 1, "high": 2, "options": [1]},
        {"low": True, "high": 2},
        {"low": "1", "high": 2},
        {"low": None, "high": 2},
        {"low": 1, "high": 2, "log": 1},
        {"low": 1, "high": math.inf},
        {"options": "abc"},
        {"options": {"a": 1}},
        {"options": 3},
        {"options": []},
        {"options": [[1]]},
        {"options": [{}]},
        {1: 2},
        math.nan,
        object(),
    ],
    ids=lambda value: "object" if type(value) is object else str(value),
)
def test_what_is_no_domain_is_refused_by_its_key(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_domain(value, "space.yaml: overrides.kd.weight")
    assert str(caught.value).startswith("space.yaml: overrides.kd.weight: ")
    assert "\n" not in str(caught.value)


def test_domains_stand_beside_their_fields() -> None:
    class Params(BaseModel):
        second: Annotated[int, Int(1, 3)] = 2
        fixed: float = 1.0
        first: Annotated[float, Float(0, 1)] = Field(0.5, ge=0)

    assert domains(Params) == {"second": Int(1, 3), "first": Float(0, 1)}
    assert list(domains(Params)) == ["second", "first"]


@pytest.mark.parametrize("method", METHODS)
def test_every_end_of_a_domain_is_a_value_that_its_method_takes(method: str) -> None:
    params = METHODS[method].Params
    for name, domain in domains(params).items():
        for value in domain.options if isinstance(domain, Choice) else (domain.low, domain.high):
            params.model_validate({name: value}, strict=True)


def test_domains_read_as_people_write_them() -> None:
    shown = [str(domain) for domain in (Float(1, 8, log=True), Float(0.5, 2), Int(1, 4), Choice("a", 1, True))]
    assert shown == ["1 to 8, log", "0.5 to 2", "1 to 4", "a | 1 | True"]
