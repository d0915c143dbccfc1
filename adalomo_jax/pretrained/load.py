"""Loads weights from files into a Llama's parameters, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from adalomo_jax.models import DecoderConfig
from adalomo_jax.models.fields import plain
from adalomo_jax.models.weights import Weights, encoder_of
from adalomo_jax.optimizers.kept import Kept
from adalomo_jax.pretrained.names import Tensor, check_layers, param_shapes, tensors_of
from adalomo_jax.pretrained.source import TensorSource

_NAMED = 5
"""The most tensors of one kind that an error names."""
_CHARACTERS = 90
"""The most characters of these names together; one name is always given."""
_BUFFERS = ("rotary_emb.inv_freq",)
"""Tensors that older checkpoints hold although they follow from the sizes."""


def check_tensors(config: DecoderConfig, source: TensorSource) -> None:
    """Check that the files hold the tensors of a model of these sizes.

    Raises:
        ValueError: some are missing, unexpected or have another shape; the message names all kinds.
    """
    check_layers(config.num_hidden_layers, len(source.shapes))
    expected = {tensor.name: tensor.shape for tensor in tensors_of(config)}
    missing = [name for name in expected if name not in source.shapes]
    may_be = lambda name: name.endswith(_BUFFERS) or (config.tie_word_embeddings and name == "lm_head.weight")
    unexpected = [name for name in source.shapes if name not in expected and not may_be(name)]
    both = [name for name in expected if name in source.shapes and source.shapes[name] != expected[name]]
    wrong = [f"{name} is {list(source.shapes[name])} and not {list(expected[name])}" for name in both]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if found:
        raise ValueError(f"the tensors must be those of the model's sizes; {'; '.join(found)}")


def load_params(
    config: DecoderConfig,
    source: TensorSource,
    dtype: str,
    shardings: Any | None = None,
    weights: Weights | None = None,
) -> dict[str, Any]:
    """The parameters of a `Decoder`, as a nested dictionary of arrays.

    It reads one tensor at a time and writes it into its stack, in place. Memory holds the parameters and that tensor;
    on a mesh, each process reads the parts that its devices keep.

    Args:
        config: the sizes.
        source: reads the tensors.
        dtype: the type of the parameters.
        shardings: a tree like the parameters, of ``NamedSharding``s; None puts the parameters on one device.
        weights: the form in which the matrices of layers are kept; None keeps floats.

    Raises:
        ValueError: see `check_tensors`; or a tensor has values that are not finite in ``dtype``.
    """
    check_tensors(config, source)
    by_path = dict(_leaves(shardings)) if shardings is not None else {}
    tensors: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in tensors_of(config):
        tensors.setdefault(tensor.path, []).append(tensor)
    params: dict[str, Any] = {}
    for path, shape in _leaves(param_shapes(config, dtype)):
        sharding = by_path.get(path) or SingleDeviceSharding(jax.local_devices()[0])
        _put(params, path, _load_leaf(source, tensors[path], shape, sharding, encoder_of(shape, weights)))
    return params


def _load_leaf(
    source: TensorSource,
    tensors: list[Tensor],
    shape: jax.ShapeDtypeStruct,
    sharding: Any,
    encode: Callable[[jax.Array], Kept] | None,
) -> Any:
    """A parameter, from one tensor or from many. The write also checks whether the values are finite.

    If ``encode`` is given, it puts each tensor into the form in which the stack is kept.
    """
    is_transposed = tensors[0].is_transposed
    turned = lambda x: (x.T if is_transposed else x).astype(shape.dtype)
    is_finite = lambda x: jnp.isfinite(x.astype(shape.dtype)).all()
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if _is_named(sharding) else sharding
    if not tensors[0].index:
        convert = jax.jit(lambda x: (turned(x), is_finite(x)), out_shardings=(sharding, everywhere))
        value, finite = convert(_read(source, tensors[0], sharding))
        _check_finite(finite, tensors[0], shape)
        return value.block_until_ready()
    entry_of = turned if encode is None else lambda x: encode(turned(x))
    stack, spread = _stack_of(shape, sharding, encode)

    def write(stack: Any, x: jax.Array, index: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        def put(part: jax.Array, entry: jax.Array) -> jax.Array:
            entry = jnp.expand_dims(entry, range(len(index)))
            return jax.lax.dynamic_update_slice(part, entry, (*index, *[0] * (part.ndim - len(index))))

        return jax.tree.map(put, stack, entry_of(x)), is_finite(x)

    write_in_place = jax.jit(write, donate_argnums=0, out_shardings=(spread, everywhere))
    zeros = lambda: jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), stack)
    value = jax.jit(zeros, out_shardings=spread)()
    for tensor in tensors:
        value, finite = write_in_place(value, _read(source, tensor, sharding), tensor.index)
        _check_finite(finite, tensor, shape)
        # Wait, so that the next tensor is not read while this one is still in memory.
        jax.block_until_ready(value)
    return value


def _stack_of(
    shape: jax.ShapeDtypeStruct, sharding: Any, encode: Callable[[jax.Array], Kept] | None
) -> tuple[Any, Any]:
    """The shapes of a stack in the form in which it is kept, and how its parts are spread."""
    if encode is None:
        return shape, sharding
    stack: Any = jax.eval_shape(encode, shape)
    return stack, stack.spread(sharding) if _is_named(sharding) else jax.tree.map(lambda _: sharding, stack)


def _check_finite(finite: jax.Array, tensor: Tensor, shape: jax.ShapeDtypeStruct) -> None:
    if not finite:
        raise ValueError(
            f"the tensor {tensor.name} must be of finite numbers, and has NaN, infinities or what {shape.dtype} cannot "
            "hold: the weights are broken"
        )


def _read(source: TensorSource, tensor: Tensor, sharding: Any) -> jax.Array:
    """A tensor, in its file's layout, on the devices that keep it."""
    read = lambda index: source.read(tensor.name, index or ())
    return jax.make_array_from_callback(tensor.shape, _as_stored(sharding, tensor), read)


def _as_stored(sharding: Any, tensor: Tensor) -> Any:
    """The sharding of a tensor in its file's layout: no axes for layers and experts, and transposed matrices."""
    if not _is_named(sharding):
        return sharding
    stacked = len(tensor.index)
    axes = [*sharding.spec, *[None] * 4][stacked : stacked + len(tensor.shape)]
    return NamedSharding(sharding.mesh, PartitionSpec(*(reversed(axes) if tensor.is_transposed else axes)))


def _is_named(sharding: Any) -> TypeGuard[NamedSharding]:
    return isinstance(sharding, NamedSharding)


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(key.key for key in path), leaf


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *parents, last = path
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _some(names: list[str]) -> str:
    some = [plain(name, _CHARACTERS) for name in names[:_NAMED]]
    while len(some) > 1 and sum(map(len, some)) > _CHARACTERS:
        some.pop()
    rest = f" and {len(names) - len(some)} more" if len(names) > len(some) else ""
    return ", ".join(some) + rest
