"""A command need not compile a program that it compiled before."""

import os
import subprocess
import sys

import jax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from one_program import draw_nothing
from tiers import slow

import adalomo_jax.commands.finetune as run_module
import adalomo_jax.commands.generate as generate_module
import adalomo_jax.commands.memory as fit_module
from adalomo_jax.cli import main
from adalomo_jax.commands import compilation_cache
from adalomo_jax.commands.compilation_cache import cache_folder
from adalomo_jax.models import PRESETS

HITS = []
jax.monitoring.register_event_listener(lambda event, **_: HITS.append(event) if event.endswith("/cache_hits") else None)


@pytest.fixture
def no_setting(tmp_path, monkeypatch):
    """The environment names no cache folder, so the tests' own folder is not in use."""
    before = os.environ["JAX_COMPILATION_CACHE_DIR"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax_cache.reset_cache()


def kept(folder):
    return {path.name.split("-")[0] for path in folder.rglob("*-cache")}


@pytest.mark.slow
def test_the_second_run_finds_the_step_that_the_first_has_compiled(no_setting, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", tiny.TINY)
    draw_nothing(monkeypatch)
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 200)
    sizes = ["--batch-size", "1", "--seq-len", "16", "--steps", "2"]
    hits = []
    for name in ("first", "second"):
        before = len(HITS)
        main(["finetune", "--data", str(tmp_path / "text.txt"), *sizes, "--output", str(tmp_path / name)])
        hits.append(len(HITS) - before)
        assert "jit___call" in kept(tmp_path / "cache" / "adalomo-jax")
    assert hits[1] > hits[0]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("command", ["finetune", "generate --model tiny --prompt x", "memory"])
def test_each_command_that_compiles_keeps_it(command, no_setting, monkeypatch):
    for module in (run_module, generate_module, fit_module):
        monkeypatch.setattr(module, "run", lambda *_: None)
    main(command.split())
    jax.jit(lambda x: x + 1)(1.0)
    assert kept(cache_folder())


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        slow({}, "cache"),
        ({"JAX_COMPILATION_CACHE_DIR": "mine"}, "mine"),
        slow({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None),
    ],
    ids=["none", "folder", "off"],
)
def test_jax_s_own_settings_hold(settings, place, tmp_path):
    """A new process tests this, because JAX reads its settings when it is imported."""
    code = "from adalomo_jax.commands.compilation_cache import use_compilation_cache; use_compilation_cache()\n"
    code += "import jax; print(jax.jit(lambda x: x + 1)(1.0))"
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")} | settings
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=tmp_path)
    assert [name for name in ("cache", "mine") if kept(tmp_path / name)] == ([place] if place else [])


@pytest.mark.parametrize("base", [None, "/elsewhere"])
def test_processors_with_other_instructions_have_folders_of_their_own(base, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if base:
        monkeypatch.setenv("XDG_CACHE_HOME", base)
    mine = cache_folder()
    assert mine.parent == type(mine)(base or tmp_path / ".cache") / "adalomo-jax"
    monkeypatch.setattr(compilation_cache, "_instructions", lambda: "of another")
    assert cache_folder() != mine
