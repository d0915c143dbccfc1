"""The script ``adalomo-jax``, and ``python -m adalomo_jax``."""

import signal


def main() -> None:
    """Holds Ctrl-C back before all else is imported; `cli.main` lets it through, once it can say so in one line."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    from adalomo_jax.cli import main

    main()


if __name__ == "__main__":
    main()
