"""`heterokd plan`: what a search will take in time, hours of devices, money, memory and disk, before it is begun.

`counting` says how many trainings, `measuring` and `timing` what each costs here, `simulating` plays the search with
both, `estimate` makes a `Plan` of it; `experiment` puts it together, `following` sets it beside what a search took.
"""

from heterokd.plan.costs import Costs, MethodCost
from heterokd.plan.counting import Counts, count
from heterokd.plan.estimate import Plan, Range, Stock, estimate
from heterokd.plan.experiment import look_around, plan_experiment
from heterokd.plan.following import Following, planned

__all__ = [
    "Costs",
    "Counts",
    "Following",
    "MethodCost",
    "Plan",
    "Range",
    "Stock",
    "count",
    "estimate",
    "look_around",
    "plan_experiment",
    "planned",
]
