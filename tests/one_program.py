"""Helpers for tests of many runs: runs compile a shared program once, and draw nothing."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny

import adalomo_jax.commands.finetune as run_module
from adalomo_jax.cli import main
from adalomo_jax.models import PRESETS
from adalomo_jax.training.program import build_program

OF_NO_PROGRAM = ("data", "output", "resume", "resume_step", "checkpoint_every", "keep", "evaluate_every")
"""Options that the compiled step does not depend on."""


class Kept(NamedTuple):
    """An array that a step does not consume."""

    values: np.ndarray
    sharding: Any

    def again(self):
        return jax.device_put(self.values.copy(), self.sharding)

    def shape(self, sharding):
        return jax.ShapeDtypeStruct(self.values.shape, self.values.dtype, sharding=sharding)


def keeping_programs(build=build_program):
    """Calls `build_program` once for each set of options, and gives each run its own arrays."""
    kept = {}

    def kept_program(config, model, mesh=None, restore=None):
        key = dataclasses.replace(config, **dict.fromkeys(OF_NO_PROGRAM)), model.config, mesh
        if key not in kept:
            program = build(config, model, mesh)
            first = jax.tree.map(lambda x: Kept(np.array(x), x.sharding), (program.params, program.state))
            kept[key] = program._replace(params=None, state=None), first
        program, first = kept[key]
        if restore is None:
            params, state = jax.tree.map(Kept.again, first, is_leaf=lambda x: isinstance(x, Kept))
        else:
            shape = lambda x: x.shape(None if mesh is None else x.sharding)
            params, state = restore(*jax.tree.map(shape, first, is_leaf=lambda x: isinstance(x, Kept)))
        return program._replace(params=params, state=state)

    return kept_program


def refused(capsys, command, status=2):
    """The one line that a command writes to standard error when it stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(command)
    captured = capsys.readouterr()
    assert stopped.value.code == status, captured
    assert captured.err.count("\n") == 1 and captured.err.startswith("adalomo-jax: "), captured.err
    return captured.err


def share_programs(patch):
    """Lets later runs share their programs, and draw nothing."""
    patch.setattr(run_module, "build_program", keeping_programs())
    draw_nothing(patch)


@contextlib.contextmanager
def tiny_programs():
    """`share_programs` with a smaller preset ``tiny``, for the fixture of a test module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", tiny.TINY)
        share_programs(patch)
        yield


def draw_nothing(patch):
    """Lets later runs draw no pictures, and generate no sample of text."""
    for name in ("plot_losses", "plot_run"):
        patch.setattr(run_module, name, lambda path, *_: path.touch())
    patch.setattr(run_module, "sample", lambda *_: "no sample")


def start_undrawn(args, log):
    """Runs the command in a process of its own, like `tiny.start`."""
    draw_nothing(pytest.MonkeyPatch())
    tiny.start(args, log)
