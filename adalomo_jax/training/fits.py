"""Whether a run can fit this device, by shapes alone: before its weights are fetched."""

from __future__ import annotations

import jax

from adalomo_jax.inputs import InputError
from adalomo_jax.memory import TARGETS, estimate_usage
from adalomo_jax.models import DecoderConfig
from adalomo_jax.training.config import FinetuneConfig
from adalomo_jax.training.program import abstract_params, make_training


def check_fits(config: FinetuneConfig, model: DecoderConfig) -> None:
    """Raise InputError if the step needs more memory than this device has, by `estimate_usage`'s lower bound.

    A run on several devices is not checked: each has a part of it.
    """
    if config.mesh is not None or config.coordinator is not None:
        return
    device = jax.local_devices()[0]
    limit = TARGETS["cpu"].limit_bytes if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return
    training = make_training(config, model, None, platform=device.platform)
    target = TARGETS["tpu-v5e" if device.platform == "tpu" else "cpu"]  # a TPU's bound leaves out its vector memory
    step = training.step
    usage = estimate_usage(step, abstract_params(training, None), *training.args, target=target, fused=config.fused)
    if usage.peak_bytes > limit:
        raise InputError(
            f"--model {config.model} needs at least {usage.peak_bytes / 1e9:.1f} GB with these options, and this "
            f"{device.device_kind} has {limit / 1e9:.1f} GB: take --weights int8, --dtype bfloat16, a shorter "
            "--seq-len or a smaller model; adalomo-jax memory tells what each takes"
        )
