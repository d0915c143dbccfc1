"""A run shows its progress on a terminal."""

import io
from functools import partial

import pytest
from rich.console import Console
from rich.progress import Progress

import adalomo_jax.training.summary as report
from adalomo_jax.training.metrics import EvaluationRow, StepRow
from adalomo_jax.training.summary import progress_bar


@pytest.mark.parametrize(("peak", "memory"), [(2_500_000_000, "2.50 GB"), (None, "not known")])
def test_progress_shows_loss_speed_and_memory(peak, memory, monkeypatch):
    monkeypatch.setattr(report, "peak_bytes", lambda: peak)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    with progress_bar(console, steps=6) as show:
        show(EvaluationRow.of(0, 5.5))
        show(StepRow(step=3, loss=1.25, grad_norm=0.5, learning_rate=1e-3, tokens_per_second=12345.6))
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    line = next(line for line in printed.splitlines() if "3/6" in line)
    assert f"loss 1.250  12,346 tokens/s  {memory}" in line
    assert "step      0  evaluation loss 5.500  perplexity 244.69" in printed


def test_progress_shows_the_time_left_of_slow_steps(monkeypatch):
    """The rows of a long run are minutes apart."""
    now = [0.0]
    monkeypatch.setattr(report, "Progress", partial(Progress, get_time=lambda: now[0]))
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    with progress_bar(console, steps=100) as show:
        for step in range(1, 4):
            now[0] += 300.0
            show(StepRow(step=10 * step, loss=1.25, grad_norm=0.5, learning_rate=1e-3, tokens_per_second=1.0))
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "0:35:00" in next(line for line in reversed(printed.splitlines()) if "30/100" in line)
