"""Checkpoints of a run: saved while it trains, and gone on from to the same bits."""
