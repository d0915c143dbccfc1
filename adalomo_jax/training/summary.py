"""What a run shows: its progress, and one screen of figures at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from adalomo_jax.inputs import one_line
from adalomo_jax.memory.usage import format_bytes
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.loop import Trained
from adalomo_jax.training.memory_use import peak_bytes
from adalomo_jax.training.metrics import EvaluationRow, Row, StepRow, perplexity
from adalomo_jax.training.program import Program, tree_bytes

_SPEED_SECONDS = 86_400.0
"""The time left is estimated over this period. Rich's half a minute may pass between two rows: it would show none."""


@contextmanager
def progress_bar(console: Console, steps: int) -> Iterator[Callable[[Row], None]]:
    """Yields the function that shows a row: steps move the bar, evaluations are lines of their own."""
    columns = [BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}")]
    with Progress(*columns, console=console, speed_estimate_period=_SPEED_SECONDS) as progress:
        task = progress.add_task("train", total=steps, now="")

        def show(row: Row) -> None:
            if isinstance(row, StepRow):
                progress.update(task, completed=row.step, now=_now(row))
            else:
                said = f"step {row.step:>6}  evaluation loss {row.eval_loss:.3f}  perplexity {row.perplexity:.2f}"
                progress.console.print(said, highlight=False)

        yield show


class Summary(NamedTuple):
    """The figures of a run, as ``summary.json`` holds them. On a mesh, bytes are those of one device."""

    model: str
    optimizer: str
    fused: bool
    dtype: str
    weights: str | None
    """The form that keeps the matrices of the layers; None for floats."""
    mesh: str | None
    attention: str
    steps: int
    skipped_steps: int
    """Steps in which something was not finite, which were not written."""
    first_eval_loss: float | None
    """Nats a token, before training; None if it was not evaluated then."""
    eval_loss: float
    """Nats a token, after the last step."""
    tokens_per_second: float
    """Over the training steps; compilation and evaluation do not count."""
    process_bytes: int | None
    """The most memory of this process, the compiler's included."""
    compiled_bytes: int | None
    """Arguments, outputs and temporaries of the compiled step."""
    params_bytes: int
    state_bytes: int
    gradient_bytes: int
    """The most gradients alive at once."""


def summarize(config: FinetuneConfig, name: str, program: Program, trained: Trained, rows: list[Row]) -> Summary:
    """The figures of a finished run; the name is the model's."""
    evaluations = [row for row in rows if isinstance(row, EvaluationRow)]
    return Summary(
        model=name,
        optimizer=config.optimizer,
        fused=config.fused,
        dtype=config.dtype,
        weights=config.weights,
        mesh=config.mesh,
        attention=program.attention,
        steps=config.steps,
        skipped_steps=int(trained.state.skipped),
        first_eval_loss=evaluations[0].eval_loss if evaluations[0].step == 0 else None,
        eval_loss=evaluations[-1].eval_loss,
        tokens_per_second=trained.tokens_per_second,
        process_bytes=peak_bytes(),
        compiled_bytes=program.compiled_bytes,
        params_bytes=tree_bytes(trained.params),
        state_bytes=tree_bytes(trained.state),
        gradient_bytes=program.gradient_bytes,
    )


def summary_table(summary: Summary) -> Table:
    """The figures on one screen."""
    how = "fused" if summary.fused else "unfused"
    where = f", {summary.mesh}: bytes a device" if summary.mesh else ""
    kept = f", weights in {summary.weights}" if summary.weights else ""
    title = Text(f"{summary.model}, {summary.optimizer}, {how}, {summary.dtype}{kept}{where}")  # as it is: no markup
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    losses = [loss for loss in (summary.first_eval_loss, summary.eval_loss) if loss is not None]
    table.add_row("evaluation loss (nats a token)", " to ".join(f"{loss:.3f}" for loss in losses))
    table.add_row("evaluation perplexity", " to ".join(f"{perplexity(loss):.2f}" for loss in losses))
    table.add_row("training tokens a second", f"{summary.tokens_per_second:,.0f}")
    if summary.skipped_steps:
        table.add_row("steps not written, because something was not finite", f"{summary.skipped_steps:,}")
    table.add_row("attention", summary.attention)
    table.add_section()
    table.add_row("peak memory of this process", format_bytes(summary.process_bytes))
    table.add_row("compiled step: arguments, outputs, temporaries", format_bytes(summary.compiled_bytes))
    table.add_row("parameters", format_bytes(summary.params_bytes))
    table.add_row("optimizer state", format_bytes(summary.state_bytes))
    table.add_row("gradients alive at once", format_bytes(summary.gradient_bytes))
    return table


@contextmanager
def warned_of(what: str) -> Iterator[None]:
    """Turns an error into a warning, when the weights exist already or are being trained."""
    try:
        yield
    except Exception as error:
        print(f"adalomo-jax: warning: {what}: {one_line(error)[:300]}", file=sys.stderr)


def _now(row: StepRow) -> str:
    return f"loss {row.loss:.3f}  {row.tokens_per_second:,.0f} tokens/s  {format_bytes(peak_bytes())}"
