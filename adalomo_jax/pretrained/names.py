"""The tensors of a Llama under Hugging Face's names, and the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from adalomo_jax.models import Decoder, DecoderConfig
from adalomo_jax.models.hugging_face import family_of


class Tensor(NamedTuple):
    """A tensor of a checkpoint."""

    name: str
    """Hugging Face's name, such as ``model.layers.0.self_attn.q_proj.weight``."""
    shape: tuple[int, ...]
    """The shape in the checkpoint: matrices are ``[out, in]``."""
    path: tuple[str, ...]
    """The path of the parameter in the nested dictionary of a `Decoder`'s parameters."""
    index: tuple[int, ...]
    """Its place in the parameter: its layer, if the parameter stacks layers, and then its expert, if it has those."""
    is_transposed: bool
    """Whether the parameter stores it as ``[in, out]``, like Flax's kernels."""


def tensors_of(config: DecoderConfig) -> list[Tensor]:
    """All tensors of a model of these sizes, layer by layer.

    Example:
        >>> from adalomo_jax.models import PRESETS
        >>> tensors_of(PRESETS["tiny"])[0][:2]
        ('model.embed_tokens.weight', (256, 128))
    """
    tensors, family = [], family_of(config)
    renamed = {} if family is None else family.tensors
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
        path = tuple(key.key for key in path)
        stacked = (path[0] == "layers") + ("experts" in path)
        is_transposed = path[-1] == "kernel"
        shape = leaf.shape[stacked:][::-1] if is_transposed else leaf.shape[stacked:]
        for index in np.ndindex(leaf.shape[:stacked]):
            tensors.append(Tensor(_name(path, index, renamed), shape, path, index, is_transposed))
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


def _name(path: tuple[str, ...], index: tuple[int, ...], renamed: Mapping[str, str]) -> str:
    *modules, kind = path
    for module, place in zip(("layers", "experts"), index):
        modules.insert(modules.index(module) + 1, str(place))
    modules = [renamed.get(name, name) for name in modules]
    return ".".join([*([] if modules[0] == "lm_head" else ["model"]), *modules, "bias" if kind == "bias" else "weight"])


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The embedding, the layers, and what comes after them."""
    return (0 if tensor.path[0] == "embed_tokens" else 1 if tensor.index else 2, *tensor.index[:1])
