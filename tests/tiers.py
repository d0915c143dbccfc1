"""Some cases always run. Others, further combinations of these, run only with ``-m slow``."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def always(names: Any, chosen: Any) -> list[Any]:
    """The chosen cases always run, the others only with ``-m slow``."""
    return [name if name in chosen else slow(name) for name in names]
