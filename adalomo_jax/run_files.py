"""The names of the files that a run writes, and how its folder is told from text."""

from __future__ import annotations

from pathlib import Path

METRICS = "metrics.jsonl"
"""The file in a run's output that holds its rows."""
RUN_FILES = (
    *(METRICS, "summary.json", "loss.png", "run.png", "model.safetensors", "config.json"),
    "checkpoints",
)
"""What a run leaves in its output folder, besides a file for TensorBoard whose name has the time and the machine."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""How the files of a model end. A run writes its own last, after its rows. Before the rows it writes config.json."""
LOCK = ".run.lock"
"""Exists while a run writes into the folder, and holds the number of its process."""
_OF_RUNS = (METRICS, "lr.jsonl")
"""Together with other files of a run, these mark its folder, or that of a search for a learning rate."""


def is_of_run(folder: Path) -> bool:
    """Whether a folder is a run's output: its files are no text that somebody wrote."""
    others = {*RUN_FILES, "lr.png", LOCK} - {*_OF_RUNS}
    return any((folder / name).is_file() for name in _OF_RUNS) and any((folder / name).exists() for name in others)
