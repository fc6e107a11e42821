"""Experiments and recipes: their keys, checks, hashes and schema versions.

`reading.load_experiment(path, overrides)` returns an Experiment with every method by name; `experiment.recipe(sample)`
returns a Recipe, a training with every value fixed.
"""
