"""What type checkers see of the names that `heterokd/__init__.py` gives lazily."""

from heterokd.library import Experiment as Experiment
from heterokd.library import distill as distill
from heterokd.library import load_experiment as load_experiment
from heterokd.library import load_student as load_student
from heterokd.library import search as search

__version__: str
