"""The commands. What they do stands in the packages that they call."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from adalomo_jax.bench.config import BenchConfig
    from adalomo_jax.finetune.compare import PlotConfig
    from adalomo_jax.finetune.config import FinetuneConfig
    from adalomo_jax.finetune.fit_config import MemoryConfig
    from adalomo_jax.finetune.generate_config import GenerateConfig

EXTRA = (
    *("flax", "gguf", "grain", "jinja2", "matplotlib", "orbax", "pydantic", "rich", "safetensors"),
    *("tensorboardX", "tokenizers", "tyro"),
)
"""What the extra ``finetune`` installs: the script is there without it."""


def main(args: Sequence[str] | None = None) -> None:
    """``adalomo-jax``: exits with 0, or after one line on stderr: 2, unusable input; 130, interrupted; 143, SIGTERM."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        _stop(f"the commands need {', '.join(missing)}: pip install 'adalomo-jax[finetune]'", 2)
    from adalomo_jax.finetune.config import InputError, Stopped

    try:
        _run(_parse(args))
    except InputError as error:
        _stop(str(error), 2)
    except Stopped as stopped:
        _stop(str(stopped), 143)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except Exception as error:  # of any library that writes
        if "No space left" not in str(error):
            raise
        _stop(f"the disk is full: {' '.join(str(error).split())}", 2)


def _parse(args: Sequence[str] | None) -> Any:
    """The options of the command that ``args`` name."""
    import tyro

    from adalomo_jax.bench.config import BenchConfig
    from adalomo_jax.finetune.compare import PlotConfig
    from adalomo_jax.finetune.config import FinetuneConfig, InputError
    from adalomo_jax.finetune.fit_config import MemoryConfig
    from adalomo_jax.finetune.generate_config import GenerateConfig

    commands = {
        "finetune": FinetuneConfig,
        "generate": GenerateConfig,
        "plot": PlotConfig,
        "memory": MemoryConfig,
        "bench": BenchConfig,
    }
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="adalomo-jax",
                description="Full-parameter training in the memory of the weights.",
                args=args,
                config=(tyro.conf.DisallowNone,),
            )
    except SystemExit as stopped:
        if stopped.code != 2:  # --help
            raise
    given = sys.argv[1:] if args is None else args
    command = f" {given[0]}" if given and given[0] in commands else ""
    raise InputError(f"{_first_paragraph(printed.getvalue())}; see adalomo-jax{command} --help")


def _first_paragraph(box: str) -> str:
    """What tyro 1.0 says below the title and above the rule; its events for errors are private, so the text is read."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    below_title = [line.strip(" │") for line in plain.splitlines()[1:]]
    says = lambda line: line.strip("-─") != ""  # the title has a rule below it where stdout is not UTF-8
    first = itertools.takewhile(says, itertools.dropwhile(lambda line: not says(line), below_title))
    return " ".join(first).rstrip(".")


def _run(command: FinetuneConfig | GenerateConfig | PlotConfig | MemoryConfig | BenchConfig) -> None:
    """Imports what a command needs only when it runs, so that ``--help`` is quick."""
    from adalomo_jax.finetune.compare import PlotConfig, compare
    from adalomo_jax.finetune.compilation_cache import use_compilation_cache
    from adalomo_jax.finetune.config import FinetuneConfig
    from adalomo_jax.finetune.fit_config import MemoryConfig
    from adalomo_jax.finetune.generate_config import GenerateConfig

    if isinstance(command, FinetuneConfig | GenerateConfig | MemoryConfig):
        use_compilation_cache()
    if isinstance(command, FinetuneConfig):
        from adalomo_jax.finetune.run import run

        run(command)
    elif isinstance(command, GenerateConfig):
        from adalomo_jax.finetune.generate import run as run_generate

        run_generate(command)
    elif isinstance(command, PlotConfig):
        compare(command)
    elif isinstance(command, MemoryConfig):
        from adalomo_jax.finetune.fit import run as run_memory

        run_memory(command)
    else:
        from adalomo_jax.bench.run import run as run_bench

        run_bench(command)


def _stop(message: str, status: int) -> NoReturn:
    print(f"adalomo-jax: {message}", file=sys.stderr)
    sys.exit(status)
