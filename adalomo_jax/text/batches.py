"""Batches of packed sequences: endless ones to train on, and the same ones each time to evaluate on."""

from __future__ import annotations

import grain
import numpy as np

from adalomo_jax.text.data import EVALUATION_BATCHES, EVALUATION_SEQUENCES, Data
from adalomo_jax.text.packing import Batch

ENDLESS = 2**48
"""More sequences than any run reads."""


def training_batches(
    data: Data, *, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> grain.IterDataset[Batch]:
    """Batches without end: all sequences once in an order drawn from the seed, then again in another order.

    Its iterators yield this process's rows of the batches, ``[batch_size // processes, seq_len]``. Batch k has
    the same sequences, over all processes together, however many there are. An iterator's ``get_state`` and
    ``set_state`` continue it with the very next batch.

    Args:
        data: all of it, the same in each process.
        batch_size: sequences of all processes together; a multiple of ``processes``.
        seed: from 0 to 2**32 - 1.
        process: which process this is, from 0.
        processes: how many there are.

    Raises:
        ValueError: the batch cannot be divided, or there is no such process.
    """
    if batch_size < 1 or batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {batch_size}")
    if not 0 <= process < processes:
        raise ValueError(f"process must be from 0 to one less than the {processes} processes, got {process}")
    # Only the numbers of sequences pass through grain. One operation then takes a whole batch of sequences.
    # Not repeat(): if a batch is one sequence, its length is more than len() can say (grain 0.2.18).
    epochs = ENDLESS // data.train.sequences + 1
    numbers = grain.MapDataset.range(data.train.sequences).seed(seed).shuffle().repeat(epochs)
    rows = numbers[process::processes].batch(batch_size // processes).map(data.train.take)
    # No threads read ahead: the sequences are in memory, and a batch of them is ready in well under a millisecond.
    return rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def evaluation_batches(data: Data, *, batch_size: int, parts: int = 1) -> Batch:
    """``[batches, batch_size, seq_len]``: fixed sequences, evenly spaced, each once.

    The batch size is a multiple of ``parts``. Small texts give fewer or smaller batches.
    """
    available = data.evaluation.sequences
    batch_size = min(batch_size, available) // parts * parts
    wanted = max(EVALUATION_BATCHES, -(-EVALUATION_SEQUENCES // batch_size))
    batches = min(wanted, available // batch_size)
    chosen = np.linspace(0, available - 1, batches * batch_size).astype(np.int64)
    return data.evaluation.take(chosen.reshape(batches, batch_size))
