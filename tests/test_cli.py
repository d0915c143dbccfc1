"""The commands refuse options that they cannot parse, name missing packages, and explain options in ``--help``."""

import ast
import dataclasses
import inspect
import io
import itertools
import re
import subprocess
import sys

import pytest

from adalomo_jax.cli import EXTRA, main
from adalomo_jax.models import PRESETS
from adalomo_jax.rules import HELP
from adalomo_jax.training.config import FinetuneConfig


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("finetune --learning-rate abc", "Error parsing --learning-rate: no type matching FLOAT .* from ['abc']"),
        ("finetune --learning-rate None", "Error parsing --learning-rate: .*['None']"),
        ("finetune --steps x", "Error parsing --steps: invalid literal for int() with base 10: 'x'"),
        ("finetune --steps", "Missing value for argument '--steps'"),
        ("finetune --schedule foo", "invalid choice 'foo' for argument '--schedule'. .*'constant', 'linear', 'cosine'"),
        ("finetune --optimizer sgd", "invalid choice 'sgd' for argument '--optimizer'. .*'adafactor', 'adamw'"),
        ("finetune --foo", "Unrecognized options: --foo"),
        ("memory --device tpu-v9", "invalid choice 'tpu-v9' for argument '--device'. .*'tpu-v5e', .*'cpu'"),
        ("pretrain", "Unrecognized options: pretrain"),
        ("", "Expected one of {finetune, generate, plot, memory, bench}"),
        ("generate --prompt x", "Missing from adalomo-jax generate: --model STR"),
        ("generate --prompt x --model y --length z", "Error parsing --length"),
        ("plot --foo", "Unrecognized options: --foo"),
        ("bench --against x", "invalid choice 'x' for argument '--against'. .*'lomo-optim'"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_and_status_2(arguments, message, encoding, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    pattern = ".*".join(map(re.escape, message.split(".*")))
    assert stopped.value.code == 2
    command = (
        f" {arguments.split()[0]}" if arguments.startswith(("finetune", "generate", "plot", "memory", "bench")) else ""
    )
    assert re.fullmatch(f"adalomo-jax: {pattern}.*; see adalomo-jax{command} --help\n", capsys.readouterr().err)


def test_without_the_extra_one_line_names_it():
    """All of the extra is missing. A new process tests this, as no part of it may be imported before."""
    missing = f"import sys; sys.modules |= dict.fromkeys({EXTRA!r}); "
    code = missing + "from adalomo_jax.cli import main; main(['finetune', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"adalomo-jax: the commands need {', '.join(EXTRA)}: pip install 'adalomo-jax[finetune]'\n"


@pytest.mark.parametrize("name", EXTRA)
def test_without_a_part_of_the_extra_one_line_names_it(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--help"])
    needs = f"adalomo-jax: the commands need {name}: pip install 'adalomo-jax[finetune]'\n"
    assert capsys.readouterr() == ("", needs)


def documentation():
    """The text below each field of FinetuneConfig."""
    (definition,) = ast.parse(inspect.getsource(FinetuneConfig)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: ast.literal_eval(text.value)
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }


def test_help_explains_every_option_and_names_every_preset():
    command = [sys.executable, "-m", "adalomo_jax", "finetune", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = " ".join(re.sub("[│|]", "", printed).split())
    texts = documentation() | {"optimizer": HELP}
    for field in dataclasses.fields(FinetuneConfig):
        assert f" --{field.name.replace('_', '-')} " in text.replace(",", " ")
        assert " ".join(texts[field.name].split()) in text
    assert all(name in text for name in (*PRESETS, "--no-fused"))
    assert "None" not in text and "(default: )" not in text and "Default:" not in text
