"""The command ``memory``: the steps of a training run, compiled for a chip, and what they need there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from adalomo_jax.commands.memory_options import MemoryConfig, check_memory_options, model_sizes, picture
from adalomo_jax.inputs import InputError, mesh_sizes
from adalomo_jax.memory import TARGETS, Target, Unavailable, Usage, compile_usage, devices_of, estimate_usage, prepare
from adalomo_jax.memory.tables import UsageRow, json_line, plot_usage, usage_table
from adalomo_jax.memory.targets import torus
from adalomo_jax.models import PRESETS, DecoderConfig
from adalomo_jax.models.sharding import batch_sharding, everywhere, make_mesh
from adalomo_jax.pretrained.files import write_whole
from adalomo_jax.rules import RULES, Optimizer
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.program import abstract_params, make_training


class Step(NamedTuple):
    """A step to look at."""

    name: str
    optimizer: Optimizer
    fused: bool


def run(config: MemoryConfig, console: Console | None = None) -> list[UsageRow]:
    """Compile, or estimate, each row; print the table and draw it, or print JSON.

    Raises:
        InputError: an option cannot be used, or a compiler is not installed. Nothing is compiled or written then.
    """
    check_memory_options(config)
    path, target = picture(config), TARGETS[config.device]
    model = model_sizes(config.model, PRESETS)
    prepare(target, config.chips)
    console = console or Console()
    rows = []
    for row in _rows(config, model, target, console):
        if config.json:
            print(json_line(row), flush=True)
        rows.append(row)
    title = _title(config)
    if not config.json:
        console.print(usage_table(rows, title))
    if path is not None:
        write_whole(path, lambda partial: plot_usage(partial, rows, title))
    if path is not None and not config.json:
        console.print(f"drawn to {path}", highlight=False, soft_wrap=True)
    return rows


def steps_of(config: MemoryConfig) -> list[Step]:
    """The step that the options name, and with ``--compare`` the others."""
    first, *others = RULES.values()
    compared = [(first.name, False), *((rule.name, not rule.from_optax) for rule in others)]
    wanted = [(config.optimizer, config.fused), *(compared if config.compare else ())]
    return [Step(_name(optimizer, fused), optimizer, fused) for optimizer, fused in dict.fromkeys(wanted)]


def usage_of(config: MemoryConfig, model: DecoderConfig, target: Target, step: Step) -> Usage:
    """The memory of one step, which finetune would run with these options."""
    offload = config.offload if step.fused else None
    spread, model = config.chips > 1, _with_positions(model, config.seq_len)
    mesh = _mesh(config, target) if spread or offload else None
    of_batch = batch_sharding(mesh) if mesh is not None and spread else None
    options = _as_finetune(config, step)
    training = make_training(options, model, of_batch, platform=target.platform, offload=offload)
    params, args = abstract_params(training, mesh), training.args
    if mesh is not None:
        batch, count = args
        of_rows = batch_sharding(mesh)
        args = jax.tree.map(lambda x: x.update(sharding=of_rows), batch), count.update(sharding=everywhere(mesh))
        params = training.step.place(params, *args)
    usage = estimate_usage if config.estimate else compile_usage
    return usage(training.step, params, *args, target=target, fused=step.fused)


def _rows(config: MemoryConfig, model: DecoderConfig, target: Target, console: Console) -> Iterator[UsageRow]:
    for step in steps_of(config):
        doing = "estimating" if config.estimate else f"compiling for {target.name}"
        status = contextlib.nullcontext() if config.json else console.status(f"{doing}: {step.name}")
        try:
            with status:
                usage = usage_of(config, model, target, step)
        except Unavailable as error:
            raise InputError(str(error)) from None
        yield UsageRow(step.name, step.optimizer, step.fused, target.name, usage)


def _mesh(config: MemoryConfig, target: Target) -> Mesh:
    devices = devices_of(target, config.chips)
    try:
        return make_mesh(mesh_sizes(config.shard, "--shard"), devices)
    except NotImplementedError:  # the sides of the torus of chips cannot form such axes
        sides = " x ".join(map(str, torus(config.chips, target.dimensions)))
        raise InputError(
            f"--shard {config.shard} cannot be laid on {config.chips} chips, a torus of {sides}: "
            "each axis must be one side, or the product of several"
        ) from None


def _as_finetune(config: MemoryConfig, step: Step) -> FinetuneConfig:
    """The options of finetune that affect the step."""
    return FinetuneConfig(
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        seq_len=config.seq_len,
        optimizer=step.optimizer,
        fused=step.fused,
        dtype=config.dtype,
        weights=config.weights,
    )


def _with_positions(model: DecoderConfig, seq_len: int) -> DecoderConfig:
    """Rotary positions are computed, so that a longer limit takes no memory."""
    return dataclasses.replace(model, max_position_embeddings=max(model.max_position_embeddings, seq_len))


def _name(optimizer: str, fused: bool) -> str:
    of_optax = " (optax, float32 moments)" if RULES[optimizer].from_optax else ""
    return f"{optimizer}{of_optax}, {'fused' if fused else 'unfused'}"


def _title(config: MemoryConfig) -> str:
    where = config.device if config.chips == 1 else f"{config.chips} x {config.device} ({config.shard})"
    how = "lower bound, not compiled: " if config.estimate else ""
    kind = config.dtype if config.weights is None else f"{config.dtype} in {config.weights}"
    return f"{how}{config.model}, {config.batch_size} x {config.seq_len}, {kind}, on {where}"
