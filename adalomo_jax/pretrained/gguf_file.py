"""A GGUF file of llama.cpp: the sizes in its metadata, and its tensors under Hugging Face's names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np
from gguf.quants import dequantize

from adalomo_jax.models import LlamaConfig, RopeScaling
from adalomo_jax.models.rotary import frequency_divisors, rotary_frequencies
from adalomo_jax.pretrained.names import tensors_of

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
"""Llamas and Mistrals, and Qwen2."""
_BLOCK_BYTES = 2**24
"""Of the values that are dequantized at once."""
_ROPE = "rope_freqs.weight"
_LLAMA_3 = (1.0, 4.0, 8192)
"""The factors of low and high frequencies, and the positions, of all of Llama 3's scalings so far."""


class _Place(NamedTuple):
    """Where a tensor lies in the file."""

    offset: int
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    heads: int | None
    """Of what llama.cpp has its rotary pairs side by side: the number of heads."""


class GGUFSource:
    """The tensors of a GGUF file; see `TensorSource`. Values are dequantized by the ``gguf`` package, to float32.

    Raises:
        ValueError: no GGUF file, another architecture, or a scaling of rotary positions that there is no name for.
    """

    def __init__(self, path: Path):
        self.path = path
        reader, fields = open_gguf(path, lambda name: not name.startswith("tokenizer."))
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = _config(fields, tensors, path)
        architecture = fields["general.architecture"]
        names = _hugging_face_names(self.config, architecture)
        self._places: dict[str, _Place] = {}
        for tensor in reader.tensors:
            if tensor.name != _ROPE:
                name = names.get(tensor.name, tensor.name)
                shape = tuple(int(size) for size in reversed(tensor.shape))
                heads = _paired_heads(name, self.config) if architecture == "llama" else None
                self._places[name] = _Place(tensor.data_offset, shape, tensor.tensor_type, heads)
        self.shapes = MappingProxyType({name: place.shape for name, place in self._places.items()})

    @property
    def dtype(self) -> str:
        """Quantized values are products of float16 numbers and small integers."""
        types = {place.type.name for place in self._places.values() if len(place.shape) > 1}
        return {"BF16": "bfloat16", "F16": "float16"}.get(min(types), "float32") if len(types) == 1 else "float32"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, float32."""
        place = self._places[name]
        rows, *columns = index or (slice(None),)
        if place.heads is None:
            return self._rows(place, rows)[:, *columns] if columns else self._rows(place, rows)
        whole = self._rows(place, slice(None))
        pairs_apart = whole.reshape(place.heads, -1, 2, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)
        return pairs_apart[(rows, *columns)]

    def _rows(self, place: _Place, rows: slice) -> np.ndarray:
        """Dequantized in blocks: what is in memory besides the result is one of them."""
        first, end, _ = rows.indices(place.shape[0])
        width = math.prod(place.shape[1:])
        values_in_block, block_bytes = gguf.GGML_QUANT_SIZES[place.type]
        is_vector = len(place.shape) == 1
        row_bytes = width * block_bytes // values_in_block
        out = np.empty((end - first, *place.shape[1:]), np.float32)
        step = max(1, _BLOCK_BYTES // (4 * width))
        with self.path.open("rb") as file:
            file.seek(place.offset + first * row_bytes)
            for start in range(0, end - first, step):
                stop = min(start + step, end - first)
                block = np.fromfile(file, np.uint8, (stop - start) * row_bytes)
                if block.size != (stop - start) * row_bytes:
                    raise ValueError(f"{self.path} ends within a tensor: it is not whole, copy it again.")
                shaped = block if is_vector else block.reshape(stop - start, row_bytes)
                out[start:stop] = self._values(shaped, place.type).reshape(stop - start, *place.shape[1:])
        return out

    def _values(self, blocks: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        try:
            return dequantize(blocks, kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path} has a tensor of type {kind.name}, which the gguf package cannot read"
            ) from None


def open_gguf(path: Path, is_wanted: Callable[[str], bool]) -> tuple[gguf.GGUFReader, dict[str, Any]]:
    """The table of tensors of a GGUF file, and the values of those fields whose names are wanted.

    Raises:
        ValueError: it is none, or ends early.
    """
    try:
        reader = gguf.GGUFReader(path)
        return reader, {name: field.contents() for name, field in reader.fields.items() if is_wanted(name)}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"{path} is no whole GGUF file ({' '.join(str(error).split())}): copy it again.") from None


def _config(fields: dict[str, Any], tensors: dict[str, Any], path: Path) -> LlamaConfig:
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"the architecture of {path} must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    of_model: Callable[..., Any] = lambda key, default=None: fields.get(f"{architecture}.{key}", default)
    if of_model("expert_count", 0):
        raise ValueError(f"{path} must be a model without experts, got {of_model('expert_count')} of them")
    needed = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")
    missing = [f"{architecture}.{key}" for key in needed if of_model(key) is None]
    missing += [name for name in ("token_embd.weight",) if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    heads, width = of_model("attention.head_count"), of_model("embedding_length")
    head_dim = of_model("attention.key_length") or of_model("rope.dimension_count") or width // heads
    theta = _decimal(of_model("rope.freq_base", 10000.0))
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=of_model("feed_forward_length"),
        num_hidden_layers=of_model("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=of_model("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=of_model("context_length"),
        rope_theta=theta,
        rms_norm_eps=_decimal(of_model("attention.layer_norm_rms_epsilon", 1e-5)),
        tie_word_embeddings="output.weight" not in tensors,
        rope_scaling=_scaling(of_model, tensors, head_dim, theta, path),
        sliding_window=of_model("attention.sliding_window"),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
    )


def _scaling(of_model: Any, tensors: dict[str, Any], head_dim: int, theta: float, path: Path) -> RopeScaling | None:
    """Llama 3's is in a tensor of divisors, and its parameters are found by computing them again."""
    kind = of_model("rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", of_model("rope.scaling.factor"))
    if kind != "none":
        raise ValueError(f"rotary positions in {path} may be scaled by 'linear' or as Llama 3's, got {kind!r}")
    if _ROPE not in tensors:
        return None
    divisors = np.asarray(tensors[_ROPE].data, np.float32)
    scaling = RopeScaling("llama3", round(float(divisors.max()), 3), *_LLAMA_3)
    expected = frequency_divisors(rotary_frequencies(head_dim, theta), scaling)
    if divisors.shape != expected.shape or not jnp.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"{_ROPE} in {path} must be Llama 3's scaling of rotary positions, and is another one")
    return scaling


def _hugging_face_names(config: LlamaConfig, architecture: str) -> dict[str, str]:
    """Hugging Face's names of a model's tensors by llama.cpp's."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    modules = [(tensor.name, *tensor.name.rsplit(".", 1)) for tensor in tensors_of(config)]
    return {f"{names.get_name(module)}.{kind}": name for name, module, kind in modules}


def _paired_heads(name: str, config: LlamaConfig) -> int | None:
    """Of queries and keys of a Llama, whose coordinates llama.cpp turns in pairs that are side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2]) if "." in name else None


def _decimal(value: float) -> float:
    """The decimal number that was rounded to the float32 in the file."""
    return float(str(np.float32(value)))
