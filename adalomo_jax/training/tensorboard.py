"""The numbers of a run as TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from adalomo_jax.training.metrics import Row, StepRow, layer_medians
from adalomo_jax.training.summary import warned_of

FLUSH_SECONDS = 10
"""How far the file may lag behind the run."""


@contextmanager
def event_file(folder: Path, first_step: int | None = 0) -> Iterator[Callable[[Row], None]]:
    """Yields the function that adds a row to a new event file in the folder.

    Args:
        folder: exists. It may hold event files of earlier parts of the run.
        first_step: TensorBoard forgets what they hold of this step and later ones: a resumed run repeats it, and one
            that begins again repeats all. None to forget nothing.
    """
    from tensorboardX import SummaryWriter

    with ExitStack() as stack:

        @cache
        def writer() -> SummaryWriter:
            """Made with the first row: a run that ends before it leaves no file."""
            # An absolute path: the start of a relative one may be taken for a bucket's.
            made = SummaryWriter(str(folder.absolute()), purge_step=first_step, flush_secs=FLUSH_SECONDS)
            return stack.enter_context(made)

        broken: list[bool] = []

        def write(row: Row) -> None:
            if not broken:
                broken.append(True)
                with warned_of("TensorBoard's file could not be written, and ends here"):
                    for tag, value in scalars(row).items():
                        writer().add_scalar(tag, value, row.step)
                    broken.clear()

        try:
            yield write
        finally:
            with warned_of("TensorBoard's file could not be written to its end"):
                stack.close()


def scalars(row: Row) -> dict[str, float]:
    """The values of a row that TensorBoard shows, by tag. Updates are medians over each layer's matrices.

    >>> scalars(StepRow(3, 2.5, 1.0, 1e-3, 100.0))
    {'loss': 2.5, 'grad_norm': 1.0, 'learning_rate': 0.001, 'tokens_per_second': 100.0}
    """
    found = {name: value for name, value in row._asdict().items() if name not in ("step", "update_rms")}
    if isinstance(row, StepRow):
        found |= {f"update_rms/layer_{layer:02}": float(value) for layer, value in enumerate(layer_medians(row))}
    return found
