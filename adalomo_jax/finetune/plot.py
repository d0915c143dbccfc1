"""The loss curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adalomo_jax.finetune.metrics import EvaluationRow, Row, StepRow
from adalomo_jax.pretrained.files import write_whole


def plot_losses(path: Path, rows: Sequence[Row], title: str) -> None:
    """Write a PNG of the training and evaluation loss by step."""
    training = np.array([(row.step, row.loss) for row in rows if isinstance(row, StepRow)])
    evaluation = np.array([(row.step, row.eval_loss) for row in rows if isinstance(row, EvaluationRow)])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*training.T, linewidth=1, color="tab:gray", label="training batch")
    axes.plot(*evaluation.T, marker="o", markersize=4, color="tab:red", label="evaluation text")
    axes.set(title=title, xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda partial: FigureCanvasAgg(figure).print_png(partial))
