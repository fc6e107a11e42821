"""`heterokd plan`: estimate time, device-hours, money, memory and disk of a search before it starts.

`counts` counts the trainings, `costs` holds the cost of each, `simulation` simulates the search with both, `estimate`
makes a `Plan` from many simulations, `record` compares it with what the search took. `execution.planning` measures.
"""
