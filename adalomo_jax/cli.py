"""The commands. The packages that they call do the work."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from adalomo_jax.printable import printable

if TYPE_CHECKING:
    from adalomo_jax.bench.config import BenchConfig
    from adalomo_jax.commands.generate_options import GenerateConfig
    from adalomo_jax.commands.memory_options import MemoryConfig
    from adalomo_jax.commands.plot import PlotConfig
    from adalomo_jax.training.config import FinetuneConfig

EXTRA = (
    *("flax", "gguf", "grain", "jinja2", "matplotlib", "orbax", "pydantic", "rich", "safetensors"),
    *("tensorboardX", "tokenizers", "tyro"),
)
"""The packages that the extra ``finetune`` installs. The script exists without it."""
_LONGEST = 4_000
"""Most characters of a message."""


def main(args: Sequence[str] | None = None) -> None:
    """``adalomo-jax``: exits with 0, or after one line on stderr.

    2: unusable input, no memory, or a file that could not be written; 130: interrupted; 141: nobody reads the output
    any more; 143: SIGTERM.
    """
    try:
        _main(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Output that is not yet written would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _stop("nobody reads the output any more", 141)


def _main(args: Sequence[str] | None) -> None:
    try:
        with _interrupted_after():
            missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
            if missing:
                _stop(f"the commands need {', '.join(missing)}: pip install 'adalomo-jax[finetune]'", 2)
            from adalomo_jax.commands.failures import reason_of
            from adalomo_jax.inputs import InputError, Stopped

            try:
                run = _runner(_parse(args))
            except InputError as error:
                _stop(str(error), 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    try:
        run()
    except InputError as error:
        _stop(str(error), 2)
    except Stopped as stopped:
        _stop(str(stopped), 143)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:
        raise
    except Exception as error:  # from any library that writes, or asks for memory
        reason = reason_of(error)
        if reason is None:
            raise
        _stop(reason, 2)


@contextlib.contextmanager
def _interrupted_after() -> Iterator[None]:
    """Holds Ctrl-C back until its body is done: an interrupted import of a library ends in a traceback, or crashes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    if hasattr(signal, "pthread_sigmask"):  # `__main__` holds it back until here
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if previous is None else previous)
        if asked:
            raise KeyboardInterrupt


def _parse(args: Sequence[str] | None) -> Any:
    """The options of the command that ``args`` name."""
    import tyro

    from adalomo_jax.bench.config import BenchConfig
    from adalomo_jax.commands.generate_options import GenerateConfig
    from adalomo_jax.commands.memory_options import MemoryConfig
    from adalomo_jax.commands.plot import PlotConfig
    from adalomo_jax.inputs import InputError
    from adalomo_jax.training.config import FinetuneConfig

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
    """What tyro 1.0 says below the title and above the rule. This reads text, as tyro's error events are private."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    below_title = [line.strip(" │") for line in plain.splitlines()[1:]]
    says = lambda line: line.strip("-─") != ""  # the title has a rule below it if stdout is not UTF-8
    first = itertools.takewhile(says, itertools.dropwhile(lambda line: not says(line), below_title))
    return " ".join(first).rstrip(".")


def _runner(command: FinetuneConfig | GenerateConfig | PlotConfig | MemoryConfig | BenchConfig) -> Callable[[], object]:
    """The function that a command runs. It imports only what the command needs, so that ``--help`` is quick."""
    from adalomo_jax.commands.compilation_cache import use_compilation_cache
    from adalomo_jax.commands.generate_options import GenerateConfig
    from adalomo_jax.commands.memory_options import MemoryConfig
    from adalomo_jax.commands.plot import PlotConfig, compare
    from adalomo_jax.training.config import FinetuneConfig

    if isinstance(command, FinetuneConfig | GenerateConfig | MemoryConfig):
        use_compilation_cache()
    if isinstance(command, FinetuneConfig):
        from adalomo_jax.commands.finetune import run

        return partial(run, command)
    if isinstance(command, GenerateConfig):
        from adalomo_jax.commands.generate import run as run_generate

        return partial(run_generate, command)
    if isinstance(command, PlotConfig):
        return partial(compare, command)
    if isinstance(command, MemoryConfig):
        from adalomo_jax.commands.memory import run as run_memory

        return partial(run_memory, command)
    from adalomo_jax.bench.run import run as run_bench

    return partial(run_bench, command)


def _stop(message: str, status: int) -> NoReturn:
    # The message may hold names of files and texts of libraries: it shows line ends and terminal codes as escapes.
    print(f"adalomo-jax: {printable(message, _LONGEST)}", file=sys.stderr)
    sys.exit(status)
