"""What a run shows: its progress, and one screen of figures at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adalomo_jax.finetune.config import FinetuneConfig
from adalomo_jax.finetune.loop import Trained
from adalomo_jax.finetune.memory_use import peak_bytes
from adalomo_jax.finetune.metrics import EvaluationRow, Row, StepRow
from adalomo_jax.finetune.program import Program, tree_bytes
from adalomo_jax.memory.usage import format_bytes


@contextmanager
def progress_bar(console: Console, steps: int) -> Iterator[Callable[[Row], None]]:
    """Yields the function that shows a row: steps move the bar, evaluations are lines of their own."""
    columns = [BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}")]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=steps, now="")

        def show(row: Row) -> None:
            if isinstance(row, StepRow):
                progress.update(task, completed=row.step, now=_now(row))
            else:
                said = f"step {row.step:>6}  evaluation loss {row.eval_loss:.3f}  perplexity {row.perplexity:.2f}"
                progress.console.print(said, highlight=False)

        yield show


def run_table(config: FinetuneConfig, name: str, program: Program, trained: Trained, rows: list[Row]) -> Table:
    """The report of a run; the name is the model's."""
    evaluations = [row for row in rows if isinstance(row, EvaluationRow)]
    first, last = evaluations[0], evaluations[-1]
    how = "fused" if config.fused else "unfused"
    where = f", {config.mesh}: bytes a device" if config.mesh else ""
    table = Table(title=f"{name}, {config.optimizer}, {how}, {config.dtype}{where}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("evaluation loss (nats a token)", f"{first.eval_loss:.3f} to {last.eval_loss:.3f}")
    table.add_row("evaluation perplexity", f"{first.perplexity:.2f} to {last.perplexity:.2f}")
    table.add_row("training tokens a second", f"{trained.tokens_per_second:,.0f}")
    table.add_row("attention", program.attention)
    table.add_section()
    table.add_row("peak memory of this process", format_bytes(peak_bytes()))
    table.add_row("compiled step: arguments, outputs, temporaries", format_bytes(program.compiled_bytes))
    table.add_row("parameters", format_bytes(tree_bytes(trained.params)))
    table.add_row("optimizer state", format_bytes(tree_bytes(trained.state)))
    table.add_row("gradients alive at once", format_bytes(program.gradient_bytes))
    return table


def _now(row: StepRow) -> str:
    return f"loss {row.loss:.3f}  {row.tokens_per_second:,.0f} tokens/s  {format_bytes(peak_bytes())}"
