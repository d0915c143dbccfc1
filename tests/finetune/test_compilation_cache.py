"""What a command compiles, it need not compile again."""

import json
import os
import subprocess
import sys

import pytest

from adalomo_jax.finetune import compilation_cache
from adalomo_jax.finetune.compilation_cache import cache_folder

HITS = """
import json, sys
import jax
from adalomo_jax.cli import main

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
main(sys.argv[1:])
print(json.dumps(len(hits)))
"""
TINY = ["--model", "tiny", "--batch-size", "1", "--seq-len", "16"]


def hits(tmp_path, arguments, **settings):
    """How many programs a command has found, in a process of its own, and what its standard error says."""
    keeps_all = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = os.environ | keeps_all | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | settings
    done = subprocess.run([sys.executable, "-c", HITS, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kept(folder):
    return {path.name.split("-")[0] for path in folder.rglob("*-cache")}


def test_the_second_run_finds_the_step_that_the_first_has_compiled(tmp_path):
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 200)
    command = ["finetune", *TINY, "--data", str(tmp_path / "text.txt"), "--steps", "2"]
    first = hits(tmp_path, [*command, "--output", str(tmp_path / "first")])
    assert "jit___call" in kept(tmp_path / "cache" / "adalomo-jax")
    second = hits(tmp_path, [*command, "--output", str(tmp_path / "second")])
    assert second > first
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_jax_s_own_settings_hold(tmp_path):
    command = ["memory", *TINY, "--device", "cpu", "--json"]
    hits(tmp_path, [*command, "--output", str(tmp_path / "1")], JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert kept(tmp_path / "mine") and not kept(tmp_path / "cache")
    hits(tmp_path, [*command, "--output", str(tmp_path / "2")], JAX_ENABLE_COMPILATION_CACHE="false")
    assert not kept(tmp_path / "cache")


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
