"""Fixtures of the tests of what uses Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fake_ray import FakeRay


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Ray's calls answered in this process, also where another test of it has started a Ray."""
    from fake_ray import FakeRay

    fake = FakeRay()
    for module, name, answer in fake.answers():
        monkeypatch.setattr(module, name, answer)
    return fake
