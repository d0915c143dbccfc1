"""For every option of every command, a bad value is refused in one line, or the run reaches the compiler."""

import dataclasses
import itertools
from typing import Any

import pytest
import tiny
from tiers import slow

import adalomo_jax.bench.run as bench_module
import adalomo_jax.commands.finetune as run_module
import adalomo_jax.commands.memory as fit_module
from adalomo_jax.bench.config import BenchConfig
from adalomo_jax.cli import main
from adalomo_jax.commands.generate_options import GenerateConfig
from adalomo_jax.commands.memory_options import MemoryConfig
from adalomo_jax.commands.plot import PlotConfig
from adalomo_jax.models import PRESETS
from adalomo_jax.training.config import FinetuneConfig

VALUES = ["-1", "0", "1", "2147483648", f"1{'0' * 31}", "1e400", "nan", "-inf", "0x10", "١٢", "1_000", "", " ", "x"]
VALUES += ["\udcff", "a\nb", "\x1b[31m", "x" * 5000, "../..", "/dev/zero", "None", "True", "data=1,data=1", "fsdp=0"]
VALUES += [f"tensor={'9' * 40}"]
COMMANDS: dict[str, Any] = {
    "finetune": FinetuneConfig,
    "generate": GenerateConfig,
    "plot": PlotConfig,
    "memory": MemoryConfig,
    "bench": BenchConfig,
}
NOT_TRIED = {("memory", "device"), ("bench", "rows")}


class Reached(Exception):
    """Raised when the command would compile or run."""


def options_of(command: str) -> list[str]:
    fields = dataclasses.fields(COMMANDS[command])
    return [field.name for field in fields if (command, field.name) not in NOT_TRIED]


CASES = [(command, name) for command in COMMANDS for name in options_of(command)]
ALWAYS = [("finetune", name) for name in ("steps", "mesh", "learning_rate")] + [("generate", "length")]


@pytest.fixture
def reaching(monkeypatch, tmp_path):
    """The command compiles nothing, and waits for no other process."""

    def reached(*_: Any, **__: Any):
        raise Reached

    monkeypatch.setitem(PRESETS, "tiny", tiny.TINY)
    monkeypatch.setattr(run_module, "build_program", reached)
    monkeypatch.setattr(run_module, "connect", lambda config: reached() if config.coordinator else None)
    for name in ("compile_usage", "estimate_usage", "prepare"):
        monkeypatch.setattr(fit_module, name, reached)
    monkeypatch.setattr(bench_module, "_starts", reached)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text that goes on\n" for i in range(200)))


@pytest.mark.usefixtures("reaching")
@pytest.mark.parametrize(("command", "name"), [case if case in ALWAYS else slow(*case) for case in CASES])
def test_a_value_is_taken_or_refused_in_one_line(command, name, capsys):
    own = {"finetune": ["--data", "text.txt", "--seq-len", "16"], "generate": ["--model", "/nowhere"]}
    own, reached = own | {"plot": ["/nowhere"]}, 0
    for value, form in itertools.product(VALUES, (lambda *x: list(x), lambda name, value: [f"{name}={value}"])):
        given = form(f"--{name.replace('_', '-')}", value)
        try:
            main([command, *own.get(command, []), *given])
        except Reached:
            reached += 1
        except SystemExit as stopped:
            said = capsys.readouterr().err
            lines = [line for line in said.splitlines() if line.startswith("adalomo-jax: ")]
            assert stopped.code == 2 and len(lines) == 1 and "Traceback" not in said, (given, stopped.code, said)
            assert len(lines[0]) < 5000 and lines[0].isprintable(), (given, said)
    assert reached < 2 * len(VALUES)
