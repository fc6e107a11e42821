"""Values of a domain: its ends, and the nearest to a value."""

from __future__ import annotations

from heterokd.domains import Choice, Domain, Scalar


def ends(domain: Domain) -> tuple[Scalar, ...]:
    """Return the values at which a domain is checked: all options, or both bounds."""
    return domain.options if isinstance(domain, Choice) else (domain.low, domain.high)


def nearest(value: Scalar, domain: Domain) -> Scalar:
    """Return a value, or the nearest one of a domain that does not hold it."""
    if value in domain:
        return value
    if isinstance(value, (bool, str)) or value is None:
        return ends(domain)[0]
    numbers = [end for end in ends(domain) if isinstance(end, (int, float)) and not isinstance(end, bool)]
    return min(numbers, key=lambda end: abs(end - value)) if numbers else ends(domain)[0]
