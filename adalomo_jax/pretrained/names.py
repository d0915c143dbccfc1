"""The tensors of a Llama under Hugging Face's names, and the parameters that they belong to."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from adalomo_jax.models import Decoder, DecoderConfig


class Tensor(NamedTuple):
    """A tensor of a checkpoint."""

    name: str
    """Hugging Face's name, such as ``model.layers.0.self_attn.q_proj.weight``."""
    shape: tuple[int, ...]
    """The shape in the checkpoint: matrices are ``[out, in]``."""
    path: tuple[str, ...]
    """The path of the parameter in the nested dictionary of a `Decoder`'s parameters."""
    layer: int | None
    """Its index on the parameter's layer axis; None if the parameter has none."""
    is_transposed: bool
    """Whether the parameter stores it as ``[in, out]``, like Flax's kernels."""


def tensors_of(config: DecoderConfig) -> list[Tensor]:
    """All tensors of a model of these sizes, layer by layer.

    Example:
        >>> from adalomo_jax.models import PRESETS
        >>> tensors_of(PRESETS["tiny"])[0][:2]
        ('model.embed_tokens.weight', (256, 128))
    """
    tensors = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
        path = tuple(key.key for key in path)
        is_stacked, is_transposed = path[0] == "layers", path[-1] == "kernel"
        shape = leaf.shape[1:] if is_stacked else leaf.shape
        shape = shape[::-1] if is_transposed else shape
        for layer in range(config.num_hidden_layers) if is_stacked else [None]:
            tensors.append(Tensor(_name(path, layer), shape, path, layer, is_transposed))
    return sorted(tensors, key=_order)


def check_layers(layers: int, tensors: int) -> None:
    """Refuse a file that claims too many layers, before the names of their tensors are even listed.

    Raises:
        ValueError: there are more layers than tensors.
    """
    if layers > tensors:
        raise ValueError(
            f"the tensors must be those of the model's sizes; its {layers} layers have several each, and the files "
            f"hold {tensors} in all"
        )


def param_shapes(config: DecoderConfig, dtype: str = "float32") -> dict:
    """The shapes of a `Decoder`'s parameters, as a nested dictionary."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jax.numpy.dtype(dtype)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _name(path: tuple[str, ...], layer: int | None) -> str:
    *modules, kind = path
    if layer is not None:
        modules.insert(1, str(layer))
    return ".".join([*([] if modules[0] == "lm_head" else ["model"]), *modules, "bias" if kind == "bias" else "weight"])


def _order(tensor: Tensor) -> tuple[int, int]:
    """The embedding, the layers, and what comes after them."""
    return (0 if tensor.path[0] == "embed_tokens" else 1 if tensor.layer is not None else 2, tensor.layer or 0)
