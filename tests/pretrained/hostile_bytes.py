"""Files in which a few bytes are changed."""

import json
import random

from hostile_configs import with_config
from hostile_ggufs import gguf_bytes, with_gguf
from hostile_models import CONFIG, Case, weights
from hostile_weights import with_weights


def flipped_cases(count: int) -> list[Case]:
    """Change a few bytes of a file at random: it is read, or refused in one line."""
    cases = []
    for seed in range(count):
        for name, whole, write in (
            ("config.json", json.dumps(CONFIG).encode(), with_config),
            ("safetensors", weights(), with_weights),
            ("GGUF", gguf_bytes(), with_gguf),
        ):
            cases.append(Case(f"{name} flipped {seed}", write(flipped(whole, seed)), None))
    return cases


def flipped(whole: bytes, seed: int) -> bytes:
    """Change bytes near the start, where the claims are."""
    at, changed = random.Random(seed), bytearray(whole)
    for _ in range(at.choice([1, 1, 2, 8])):
        changed[at.randrange(min(len(changed), 3000))] = at.choice([0, 1, 0x7F, 0x80, 0xFF, at.randrange(256)])
    return bytes(changed)
