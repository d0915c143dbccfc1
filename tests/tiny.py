"""The command with a model that compiles in a second, for tests that start it in a process of its own."""

import dataclasses
import os
import sys

from adalomo_jax.models import PRESETS

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4)
TINY = dataclasses.replace(PRESETS["tiny"], **SIZES)


def start(args, log=None):
    """Runs the command; its output goes to the file ``log``."""
    from adalomo_jax.cli import main

    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    PRESETS["tiny"] = TINY
    main(args)


if __name__ == "__main__":
    start(sys.argv[1:])
