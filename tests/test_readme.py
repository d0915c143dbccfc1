"""In README, the guides and the results, code runs, links lead somewhere, and tables show what was measured."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adalomo_jax.rules import RULES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "examples" / "results" / "README.md"
DOCS = [README, ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "examples").rglob("*.md"))]


def blocks(language, path=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)


PYTHON = [(path, code) for path in DOCS for code in blocks("python", path)]
CASES = [pytest.param(*x, id=x[0].name, marks=() if x[0] == README else pytest.mark.slow) for x in PYTHON]


@pytest.mark.parametrize(("path", "code"), CASES)
def test_python_block_runs(path, code):
    exec(compile(code, path.name, "exec"), {"__name__": "readme"})


def test_there_are_blocks_to_run():
    assert len(blocks("python")) == 2 and len(blocks("bash")) == 2 and len(PYTHON) == 11


def test_readme_is_read_at_once():
    assert len(README.read_text().splitlines()) <= 200


def test_the_loop_is_short():
    lines = [line for line in blocks("python")[0].splitlines() if line]
    assert len(lines) <= 15


@pytest.mark.parametrize("block", blocks("bash"))
def test_bash_block_names_what_there_is(block):
    """The block makes an environment, and the second runs these tests, so only its last command's help is run."""
    make, install, command = (shlex.split(part) for part in block.split("&&"))
    assert make == ["python3", "-m", "venv", ".venv"]
    assert install[:3] == [".venv/bin/pip", "install", "-q"]
    module = {"adalomo-jax": ["adalomo_jax"], "python": command[2:3]}[Path(command[0]).name]
    help_text = subprocess.run(
        [sys.executable, "-m", *module, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert all(word in help_text for word in command[1:] if word not in ("-m", "pytest"))


@pytest.mark.parametrize("path", DOCS, ids=[str(path.relative_to(ROOT)) for path in DOCS])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_all_examples_are_in_their_table():
    table = (ROOT / "examples" / "README.md").read_text()
    files = [*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.md")]
    assert all(f"({path.name})" in table for path in files if path.name != "README.md")


def test_the_table_of_times_is_what_the_benchmark_wrote():
    short, long = json.loads((ROOT / "examples" / "bench.json").read_text())["cases"]
    assert (short["seq_len"], long["seq_len"]) == (64, 512)

    def cells(row):
        ratio = row["adalomo_fused_over_it"]["median"]
        return f"{row['median_seconds']:.3f} | {ratio:.3f} | {row['peak_bytes'] / 1e9:.2f} GB"

    for a, b in zip(short["rows"], long["rows"], strict=True):
        assert f"| {a['name']} | {cells(a)} | {cells(b)} |" in RESULTS.read_text()


def test_the_table_of_optimizers_is_what_the_runs_came_to():
    example = ROOT / "examples" / "further_pretraining.py"
    of = runpy.run_path(str(example))
    rows = of["compare"](of["read"](example.with_suffix(".jsonl")), run_once=None)
    expected = [of["table_row"](results) for results in rows]
    assert len(expected) == len(of["ROWS"])
    assert all(row in RESULTS.read_text() for row in expected), expected


def test_readme_lists_the_rules_of_the_table():
    rows = [f"| `{rule.name}` | {rule.description} | {rule.tuned_rate:g} |" for rule in RULES.values()]
    assert "|---|---|---|\n" + "\n".join(rows) + "\n\n" in README.read_text()


def test_the_guide_names_the_rules_of_the_table():
    assert f"`--optimizer {'|'.join(RULES)}`" in (ROOT / "examples" / "command.md").read_text()
