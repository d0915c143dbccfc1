"""The commands. What they do stands in the packages that they call."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from adalomo_jax.finetune.config import FinetuneConfig, InputError

COMMANDS = {"finetune": FinetuneConfig}


def main(args: Sequence[str] | None = None) -> None:
    """``adalomo-jax``: exits with 0, with 2 for unusable input (one line on stderr), or with 130 when interrupted."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="adalomo-jax", description="Full-parameter training in the memory of the weights.", args=args
    )
    try:
        _run(command)
    except InputError as error:
        print(f"adalomo-jax: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("adalomo-jax: interrupted", file=sys.stderr)
        sys.exit(130)


def _run(command: FinetuneConfig) -> None:
    """Imports what a command needs only when it runs, so that ``--help`` is quick."""
    from adalomo_jax.finetune.run import run

    run(command)
