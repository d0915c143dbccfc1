"""Which cases run always, and which with ``-m slow`` only: further combinations of what always runs."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case of the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def always(names: Any, chosen: Any) -> list[Any]:
    """Those chosen run always, the others with ``-m slow``."""
    return [name if name in chosen else slow(name) for name in names]
