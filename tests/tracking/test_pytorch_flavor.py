"""MLflow's PyTorch flavor in a program whose root logger is its own."""

from __future__ import annotations

import logging
import subprocess
import sys


def test_the_pytorch_flavor_leaves_the_root_logger_alone() -> None:
    """MLflow's import adds a handler to it, with which warnings would be printed as `WARNING:heterokd.module:`."""
    code = (
        "import logging; import heterokd.students.promotion.challenger, heterokd.execution.driver; "
        "print(logging.getLogger().handlers, logging.getLogger().level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", str(logging.WARNING)]
