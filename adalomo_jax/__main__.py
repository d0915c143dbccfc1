"""``python -m adalomo_jax``."""

from adalomo_jax.cli import main

if __name__ == "__main__":
    main()
