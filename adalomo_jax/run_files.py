"""The names of what a run writes, and how its folder is told from text."""

from __future__ import annotations

from pathlib import Path

METRICS = "metrics.jsonl"
"""Of a run's output: its rows."""
RUN_FILES = (
    *(METRICS, "summary.json", "loss.png", "run.png", "model.safetensors", "config.json"),
    "checkpoints",
)
"""What a run leaves in its output folder, beside a file for TensorBoard whose name has the time and the machine."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""How the files of a model end. A run writes its own last, when it has rows; before them it writes config.json."""
LOCK = ".run.lock"
"""There while a run writes into the folder, with the number of its process."""
_OF_RUNS = (METRICS, "lr.jsonl")
"""Beside other files of a run, these mark its folder, or that of a search for a learning rate."""


def is_of_run(folder: Path) -> bool:
    """Whether a folder is a run's output: its files are no text that somebody wrote."""
    others = {*RUN_FILES, "lr.png", LOCK} - {*_OF_RUNS}
    return any((folder / name).is_file() for name in _OF_RUNS) and any((folder / name).exists() for name in others)
