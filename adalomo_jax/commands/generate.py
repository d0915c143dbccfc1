"""The command ``generate``: text from a checkpoint, printed as it is made."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adalomo_jax.commands.generate_options import GenerateConfig, check_generate_options
from adalomo_jax.inputs import InputError, one_line
from adalomo_jax.models import PRESETS, DecoderConfig, decoder_of
from adalomo_jax.models.sampling import Sampler, stream
from adalomo_jax.optimizers.kept import is_kept
from adalomo_jax.pretrained.by_name import find_model, find_tokenizer
from adalomo_jax.pretrained.load import load_params
from adalomo_jax.pretrained.tokenizer import ByteTokenizer, TextTokenizer, Tokenizer
from adalomo_jax.training.checkpoints.save import FOLDER, restore_params, steps_in

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The end of a text whose last token is a part of a character."""


class Loaded(NamedTuple):
    """A model to run."""

    config: DecoderConfig
    tokenizer: ByteTokenizer | TextTokenizer
    params: Any


def run(config: GenerateConfig) -> str:
    """Print the prompt, unless it is a chat's, and the text that follows. Return that text.

    Raises:
        InputError: an option, a checkpoint or the prompt cannot be used. Nothing is printed then.
    """
    check_generate_options(config)
    loaded = load_model(config.model, config.dtype)
    tokens = prompt_tokens(config, loaded.tokenizer)
    room = loaded.config.max_position_embeddings
    if len(tokens) + config.length > room:
        raise InputError(
            f"--prompt ({len(tokens):,} tokens) and --length {config.length} must fit the {room:,} positions of the "
            "model together; shorten one of them"
        )
    model = decoder_of(loaded.config, loaded.params)
    sampler = Sampler(config.temperature, config.top_p, loaded.tokenizer.stops)
    key = jax.random.key(config.seed)
    drawn = stream(model, jnp.asarray(tokens)[None], config.length, key=key, sampler=sampler)
    # An answer begins a text of its own; a continuation of the prompt does not.
    before = () if config.chat else tokens
    return _print("" if config.chat else config.prompt, (int(token) for (token,) in drawn), loaded.tokenizer, before)


def load_model(name: str, dtype: str) -> Loaded:
    """The model that ``--model`` names, with its weights in ``dtype``.

    Raises:
        InputError: there is no such model, or it is broken.
    """
    path = Path(name)
    if name in PRESETS and not path.exists():
        raise InputError(f"--model {name} is a preset without weights; give a checkpoint, or train one with finetune")
    try:
        if path.parent.name == FOLDER and path.name.isdecimal():
            params, sizes = restore_params(path)
            params = jax.tree.map(lambda x: x.astype(dtype), params, is_leaf=is_kept)
            return Loaded(sizes, find_tokenizer(path.parents[1]), params)
        model = find_model(name, lambda download: print(download, file=sys.stderr))
        if model.checkpoint is None:
            raise ValueError("it has no weights")
        return Loaded(model.config, model.tokenizer, load_params(model.config, model.checkpoint.source, dtype))
    except ValueError as error:
        steps = steps_in(path / FOLDER)
        hint = f"; the run has a checkpoint that you can name, {path / FOLDER / str(steps[-1])}" if steps else ""
        raise InputError(f"--model {name}: {one_line(error)}{hint}") from None


def prompt_tokens(config: GenerateConfig, tokenizer: ByteTokenizer | TextTokenizer) -> np.ndarray:
    """The prompt as tokens ``[P]``; for a chat, with what the template puts around it.

    Raises:
        InputError: the prompt is empty, there is no template, or the template refuses the messages.
    """
    try:
        text = _chat_text(config, tokenizer) if config.chat else config.prompt
        (encoded,) = tokenizer.encode([text], add_special=not config.chat)
    except ValueError as error:
        raise InputError(f"--model {config.model}: {one_line(error)}") from None
    if not len(encoded.tokens):
        raise InputError("--prompt must be of at least one token, got none")
    return encoded.tokens


def _chat_text(config: GenerateConfig, tokenizer: ByteTokenizer | TextTokenizer) -> str:
    if isinstance(tokenizer, ByteTokenizer):
        raise ValueError("bytes have no chat template; leave --chat out")
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    return tokenizer.prompt([*system, {"role": "user", "content": config.prompt}])


def pieces(tokens: Iterable[int], tokenizer: Tokenizer, before: Iterable[int] = ()) -> Iterator[str]:
    """The text of tokens, each piece as soon as it is known: whole characters, spaces between the tokens included.

    Together, the pieces are what the tokens add to the text of those before them, without a last token that ends a
    text or a turn. Decoded alone, the tokens would begin a text, and some tokenizers leave out a space at its
    beginning.
    """
    held = list(map(int, before))
    known = tokenizer.decode(held)
    for token in tokens:
        if token in tokenizer.stops:
            break
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith(_UNFINISHED):
            yield text[len(known) :]
            known = text
    yield tokenizer.decode(held)[len(known) :]


def _print(prompt: str, tokens: Iterable[int], tokenizer: Tokenizer, before: Iterable[int]) -> str:
    """Prints and returns the text after the prompt. Prints its speed on the standard error."""
    times: list[float] = []

    def timed() -> Iterator[int]:
        for token in tokens:
            times.append(time.perf_counter())
            yield token

    printed = ""
    print(prompt, end="", flush=True)
    try:
        for piece in pieces(timed(), tokenizer, before):
            printed += piece
            print(piece, end="", flush=True)
    except ValueError as error:  # from a tokenizer that cannot write some of its tokens
        print()
        raise InputError(one_line(error)) from None
    print()
    # The first token comes after the prompt was read, and the second after the program of one token was compiled.
    speed = f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s" if len(times) > 2 else ""
    print(f"{len(times)} tokens{speed}", file=sys.stderr)
    return printed
