"""A GGUF file of llama.cpp: the sizes in its metadata, and its tensors under Hugging Face's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.quants import dequantize
from pydantic import Field

from adalomo_jax.models import DecoderConfig, RopeScaling
from adalomo_jax.models.config_fields import (
    Epsilon,
    Factor,
    HeadDim,
    Heads,
    Layers,
    Multiplier,
    Positions,
    Theta,
    Width,
)
from adalomo_jax.models.families import FAMILIES, Family
from adalomo_jax.models.fields import Fields, check, plain, shown
from adalomo_jax.models.hugging_face import sizes_of
from adalomo_jax.models.rotary import frequency_divisors, rotary_frequencies
from adalomo_jax.pretrained.gguf_header import TensorPlace, read_header
from adalomo_jax.pretrained.names import check_layers, tensors_of

ARCHITECTURES = {(family.gguf.name, family.gguf.has_experts): family for family in FAMILIES.values() if family.gguf}
"""The families by llama.cpp's names, and by whether they have experts."""
_BLOCK_BYTES = 2**24
"""How many bytes of values are dequantized at once."""
_ROPE = "rope_freqs.weight"
_LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
_ROPE_TENSORS = (_ROPE, *_LONGROPE)
_MOST_FACTOR = 1e6
_LLAMA_3 = (1.0, 4.0, 8192)
"""The factors of low and high frequencies, and the positions; all of Llama 3's scalings so far have these."""


class _Place(NamedTuple):
    """A tensor in the file."""

    at: TensorPlace
    heads: int | None = None
    """The number of heads, if llama.cpp stores the tensor's rotary pairs side by side; otherwise None."""
    expert: int | None = None
    """The expert, if the file has those of all experts as one tensor."""
    added: float = 0.0
    """What is added to the values in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that Hugging Face's name stands for."""
        return self.at.shape if self.expert is None else self.at.shape[1:]


class _Sizes(Fields):
    """The metadata that is read, below the name of the architecture; the ranges are those of a ``config.json``."""

    embedding_length: Width
    feed_forward_length: Width
    block_count: Layers
    context_length: Positions
    heads: Heads = Field(alias="attention.head_count")
    kv_heads: Heads | None = Field(None, alias="attention.head_count_kv")
    key_length: HeadDim | None = Field(None, alias="attention.key_length")
    rms_eps: Epsilon = Field(1e-5, alias="attention.layer_norm_rms_epsilon")
    window: int = Field(0, alias="attention.sliding_window", ge=0, le=2**31 - 1)
    """0 means no window, as in llama.cpp."""
    rope_dim: HeadDim | None = Field(None, alias="rope.dimension_count")
    rope_base: Theta = Field(10000.0, alias="rope.freq_base")
    scaling: str = Field("none", alias="rope.scaling.type")
    factor: Factor | None = Field(None, alias="rope.scaling.factor")
    original: Positions | None = Field(None, alias="rope.scaling.original_context_length")
    attention_factor: Factor | None = Field(None, alias="rope.scaling.attn_factor")
    local_rope_base: Theta = Field(10000.0, alias="rope.freq_base_swa")
    experts: int = Field(0, alias="expert_count", ge=0, le=10_000)
    experts_used: int = Field(1, alias="expert_used_count", ge=1, le=10_000)
    expert_feed_forward_length: Width | None = None
    attention_softcap: Multiplier | None = Field(None, alias="attn_logit_softcapping")
    logits_softcap: Multiplier | None = Field(None, alias="final_logit_softcapping")
    attention_scale: Multiplier | None = Field(None, alias="attention.scale")
    embedding_scale: Multiplier | None = None
    residual_scale: Multiplier | None = None
    logits_scale: Multiplier = Field(1.0, alias="logit_scale")


class GGUFSource:
    """The tensors of a GGUF file; see `TensorSource`. The ``gguf`` package dequantizes values to float32.

    Raises:
        ValueError: it is not a GGUF file, has another architecture or sizes out of their ranges, or scales rotary
            positions in an unknown way; the message is one line.
    """

    def __init__(self, path: Path):
        self.path = path
        fields, tensors = read_header(path, lambda name: not name.startswith("tokenizer."))
        architecture = fields.get("general.architecture")
        if not isinstance(architecture, str) or all(name != architecture for name, _ in ARCHITECTURES):
            known = ", ".join(sorted({name for name, _ in ARCHITECTURES}))
            raise ValueError(f"the architecture of {path} must be one of {known}, got {shown(architecture)}")
        prefix = f"{architecture}."
        of_model = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
        sizes = check(_Sizes, of_model, f"{path}, {architecture}")
        check_layers(sizes.block_count, len(tensors))
        family = ARCHITECTURES.get((architecture, sizes.experts > 0))
        if family is None or family.gguf is None:
            kind = "without experts" if sizes.experts else "with experts"
            raise ValueError(f"{path} must be a {architecture} {kind}, got {sizes.experts} of them")
        self.config = _config(sizes, tensors, family, path)
        names = _hugging_face_names(self.config, architecture)
        self._places: dict[str, _Place] = {}
        for theirs, place in tensors.items():
            if len(place.shape) == 1 and gguf.GGML_QUANT_SIZES[place.type][0] > 1:
                kind = place.type.name
                raise ValueError(f"{plain(theirs)} in {path} must not be quantized, because it is a vector: got {kind}")
            for name, expert in names.get(theirs, [(theirs, None)]) if theirs not in _ROPE_TENSORS else ():
                if name in self._places:
                    raise ValueError(f"{path} has the tensor {plain(name)} twice, by llama.cpp's name and by this one")
                heads = _paired_heads(name, self.config) if family.gguf.pairs_side_by_side else None
                added = family.gguf.added_to_norms if name.endswith("norm.weight") else 0.0
                self._places[name] = _Place(place, heads, expert, added)
        self.shapes = MappingProxyType({name: place.shape for name, place in self._places.items()})

    @property
    def dtype(self) -> str:
        """The type that holds every value. Quantized values are products of float16 numbers and small integers."""
        types = {place.at.type.name for place in self._places.values() if len(place.at.shape) > 1}
        return {"BF16": "bfloat16", "F16": "float16"}.get(min(types), "float32") if len(types) == 1 else "float32"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, float32."""
        place = self._places[name]
        rows, *columns = index or (slice(None),)
        if place.expert is not None:
            (whole,) = _rows(self.path, place.at, slice(place.expert, place.expert + 1))
            return whole[(rows, *columns)]
        if place.heads is None:
            part = _rows(self.path, place.at, rows)
            part = part[:, *columns] if columns else part
            return part - np.float32(place.added) if place.added else part
        whole = _rows(self.path, place.at, slice(None))
        pairs_apart = whole.reshape(place.heads, -1, 2, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)
        return pairs_apart[(rows, *columns)]


def _rows(path: Path, place: TensorPlace, rows: slice) -> np.ndarray:
    """Rows of a tensor, dequantized in blocks: memory holds the result and one block."""
    first, end, _ = rows.indices(place.shape[0])
    width = math.prod(place.shape[1:])
    values_in_block, block_bytes = gguf.GGML_QUANT_SIZES[place.type]
    is_vector = len(place.shape) == 1
    row_bytes = width * block_bytes // values_in_block
    out = np.empty((end - first, *place.shape[1:]), np.float32)
    step = max(1, _BLOCK_BYTES // (4 * width))
    with path.open("rb") as file:
        file.seek(place.offset + first * row_bytes)
        for start in range(0, end - first, step):
            stop = min(start + step, end - first)
            block = np.fromfile(file, np.uint8, (stop - start) * row_bytes)
            if block.size != (stop - start) * row_bytes:
                raise ValueError(f"{path} ends within a tensor: it is not whole, copy it again.")
            shaped = block if is_vector else block.reshape(stop - start, row_bytes)
            out[start:stop] = _values(shaped, place.type, path).reshape(stop - start, *place.shape[1:])
    return out


def _values(blocks: np.ndarray, kind: gguf.GGMLQuantizationType, path: Path) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # the reader of the values checks that they are finite
            return dequantize(blocks, kind)
    except NotImplementedError:
        raise ValueError(f"{path} has a tensor of type {kind.name}, which the gguf package cannot read") from None


def _config(sizes: _Sizes, tensors: Mapping[str, TensorPlace], family: Family, path: Path) -> DecoderConfig:
    """The sizes, by way of the entries that the family's ``config.json`` would have."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{path} must have a token_embd.weight of two axes")
    assert family.gguf is not None
    metadata = {
        name: _decimal(value) if isinstance(value, float) else value for name, value in sizes.model_dump().items()
    }
    own = family.gguf.entries(metadata)
    is_partial = "partial_rotary_factor" in own
    head_dim = sizes.key_length or (None if is_partial else sizes.rope_dim) or sizes.embedding_length // sizes.heads
    if sizes.rope_dim not in (None, head_dim) and not is_partial:
        raise ValueError(f"{path}: rope.dimension_count must be the width of a head, {head_dim}, got {sizes.rope_dim}")
    entries = {
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": sizes.embedding_length,
        "intermediate_size": sizes.feed_forward_length,
        "num_hidden_layers": sizes.block_count,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads or sizes.heads,
        "head_dim": head_dim,
        "max_position_embeddings": sizes.context_length,
        "rope_theta": metadata["rope_base"],
        "rms_norm_eps": metadata["rms_eps"],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    of_tensors: dict[str, Any] = {
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
    }
    if family.gguf.name in ("llama", "qwen2"):  # a Mistral is a llama there
        of_tensors["sliding_window"] = sizes.window or None
    try:
        config = dataclasses.replace(sizes_of(entries | own), **of_tensors)
        return dataclasses.replace(config, rope_scaling=_scaling(sizes, tensors, config, path))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _scaling(
    sizes: _Sizes, tensors: Mapping[str, TensorPlace], config: DecoderConfig, path: Path
) -> RopeScaling | None:
    """The scaling. Llama 3's is a tensor of divisors; its parameters are those that give the same divisors."""
    divisors, of_lengths = tensors.get(_ROPE), [tensors.get(name) for name in _LONGROPE]
    if all(of_lengths):
        short, long = (tuple(map(_decimal, _rows(path, place, slice(None)))) for place in of_lengths if place)
        return RopeScaling(
            "longrope",
            original_max_position_embeddings=sizes.original or config.max_position_embeddings,
            short_factor=short,
            long_factor=long,
            attention_factor=_decimal(sizes.attention_factor or 1.0),
        )
    if sizes.scaling == "linear":
        if sizes.factor is None:
            raise ValueError(f"{path}: rope.scaling.factor is missing, which rope.scaling.type linear needs")
        return RopeScaling("linear", sizes.factor)
    if sizes.scaling != "none":
        kind = shown(sizes.scaling)
        raise ValueError(f"rotary positions in {path} may be scaled by 'linear' or as Llama 3's, got {kind}")
    if divisors is None:
        return None
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
    if divisors.shape == frequencies.shape:
        found = _rows(path, divisors, slice(None))
        if np.isfinite(found).all() and 1 <= found.max() <= _MOST_FACTOR:
            scaling = RopeScaling("llama3", round(float(found.max()), 3), *_LLAMA_3)
            if np.allclose(found, frequency_divisors(frequencies, scaling), rtol=1e-4):
                return scaling
    raise ValueError(f"{_ROPE} in {path} must be Llama 3's scaling of rotary positions, and is another one")


def _hugging_face_names(config: DecoderConfig, architecture: str) -> dict[str, list[tuple[str, int | None]]]:
    """Hugging Face's names of a model's tensors, with their experts, by llama.cpp's names."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 1)  # a map of all layers takes a millisecond per layer
    found: dict[str, list[tuple[str, int | None]]] = {}
    for tensor in tensors_of(config):
        module, part = tensor.name.rsplit(".", 1)
        layer, expert = (*tensor.index, None, None)[:2]
        of_first = module if layer is None else module.replace(f".{layer}.", ".0.", 1)
        of_all = of_first if expert is None else of_first.replace(f".experts.{expert}.", ".experts.", 1)
        name = f"{names.get_name(of_all)}.{part}"
        theirs = name if layer is None else name.replace(".0.", f".{layer}.", 1)
        found.setdefault(theirs, []).append((tensor.name, expert))
    return found


def _paired_heads(name: str, config: DecoderConfig) -> int | None:
    """The heads of a Llama's queries or keys, whose coordinates llama.cpp rotates in pairs that are side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2]) if "." in name else None


def _decimal(value: float) -> float:
    """The decimal number that was rounded to the float32 in the file."""
    return float(str(np.float32(value)))
