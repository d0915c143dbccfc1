"""Checkpoints of a run: saved while it trains. A run that continues from one ends with the same bits."""
