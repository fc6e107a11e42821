"""Optuna's distributions of a study's parameters, and those that hold the values of a trial of an earlier space."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from heterokd.domains import Choice, Domain, Int, Scalar

Spaces = Mapping[str, Mapping[str, Domain]]
"""Domains of each method. Options of a key may differ between methods (teachers for which a method cannot be built):
Optuna has all options, and a sample has an option of its method."""


def distributions(spaces: Spaces, method: str) -> dict[str, BaseDistribution]:
    """Return the distributions of a trial that the sampler did not propose; empty for a method that is not sampled."""
    if method not in spaces:
        return {}
    domains = with_all_options(spaces, method)
    return {
        "method": CategoricalDistribution(tuple(spaces)),
        **{key: distribution_of(domain) for key, domain in domains.items()},
    }


def with_all_options(spaces: Spaces, method: str) -> dict[str, Domain]:
    """Return a method's domains as Optuna has them: with every option that a key has for any method."""
    found = dict(spaces[method])
    for key, domain in found.items():
        if isinstance(domain, Choice) and not key.startswith(f"{method}."):
            others = [space[key] for space in spaces.values() if key in space]
            options = [option for other in others if isinstance(other, Choice) for option in other.options]
            found[key] = domain if set(options) == set(domain.options) else Choice(*dict.fromkeys(options))
    return found


def fitted(
    spaces: Spaces, sample: Mapping[str, Scalar], defaults: Mapping[str, Scalar] = MappingProxyType({})
) -> tuple[dict[str, Scalar], dict[str, BaseDistribution]]:
    """Return the parameters of a trial that the sampler did not propose, and their distributions.

    A value of an earlier search space may be outside of today's domain. The range of a number is then extended, as
    Optuna allows for each trial; a value that is no option any more, or no number, is left out, so that the estimator
    does not learn from it.

    Args:
        spaces: domains of each method.
        sample: values of the trial.
        defaults: values for keys that the sample leaves out.
    """
    found: dict[str, BaseDistribution] = {}
    values = {**defaults, **sample}
    for key, distribution in distributions(spaces, str(sample["method"])).items():
        holding = _holding(distribution, values[key]) if key in values else None
        if holding is not None:
            found[key] = holding
    return {key: values[key] for key in found}, found


def _holding(distribution: BaseDistribution, value: Scalar) -> BaseDistribution | None:
    """Return a distribution, with a larger range if it does not hold a number; None if it cannot hold a value."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution if value in distribution.choices else None
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (distribution.log and value <= 0):
        return None
    if distribution.low <= value <= distribution.high:
        return distribution
    if isinstance(distribution, FloatDistribution):
        return FloatDistribution(min(distribution.low, value), max(distribution.high, value), log=distribution.log)
    if value != int(value):
        return None
    low, high = min(distribution.low, int(value)), max(distribution.high, int(value))
    return IntDistribution(low, high, log=distribution.log)


def has_freedom(space: Mapping[str, Domain]) -> bool:
    """Return whether there are several possible samples."""
    return not all(distribution_of(domain).single() for domain in space.values())


def distribution_of(domain: Domain) -> BaseDistribution:
    """Return Optuna's distribution of a domain."""
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.options)
    if isinstance(domain, Int):
        return IntDistribution(domain.low, domain.high, log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)
