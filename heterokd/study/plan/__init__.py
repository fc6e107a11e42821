"""`heterokd plan`: what a search will take in time, hours of devices, money, memory and disk, before it is begun.

`counting` says how many trainings, `measuring` and `timing` what each costs here, `simulating` plays the search with
both, `estimate` makes a `Plan` of it; `experiment` puts it together, `following` sets it beside what a search took.
"""
