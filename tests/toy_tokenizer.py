"""A tokenizer for tests: bytes, with tokens that start and end a text, and a template for conversations."""

import numpy as np

from adalomo_jax.pretrained.tokenizer import ChatText, Encoded

BOS, EOS = 256, 257


class ToyTokenizer:
    """Bytes of UTF-8; ``<s>`` and ``</s>`` are tokens of their own if ``special`` is set."""

    def __init__(self, special=True):
        self.vocab_size, self.eos = (258, EOS) if special else (256, None)
        self.stops = (EOS,) if special else ()
        self.has_chat_template = special

    def encode(self, texts, *, add_special=True):
        return [self._encode(text, add_special and self.eos is not None) for text in texts]

    def parts(self, text, *, add_special=True):
        """Two halves of the tokens and spans; no token straddles them."""
        (encoded,) = self.encode([text], add_special=add_special)
        half = len(encoded.tokens) // 2
        for part in (slice(half), slice(half, None)):
            yield Encoded(encoded.tokens[part], encoded.spans[part])

    def _encode(self, text, add_bos):
        if self.eos is None:
            tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
            starts = np.cumsum(tokens & 0xC0 != 0x80) - 1  # a byte 10xxxxxx continues a character
            return Encoded(tokens, np.stack([starts, starts + 1], axis=-1).astype(np.int32))
        tokens, spans = ([BOS], [(0, 0)]) if add_bos else ([], [])
        at = 0
        while at < len(text):
            if self.eos is not None and text.startswith("</s>", at):
                tokens, spans, at = [*tokens, EOS], [*spans, (at, at + 4)], at + 4
            else:
                of_character = text[at].encode()
                tokens, spans, at = [*tokens, *of_character], [*spans, *[(at, at + 1)] * len(of_character)], at + 1
        return Encoded(np.array(tokens, np.int32), np.array(spans, np.int32).reshape(-1, 2))

    def decode(self, tokens):
        names = {BOS: b"<s>", EOS: b"</s>"}
        return b"".join(names.get(int(token), bytes([int(token) % 256])) for token in tokens).decode(errors="replace")

    def chat(self, messages, *, tools=None):
        """Writes ``user:hi|`` and ``assistant:ho</s>|``, and refuses other roles."""
        text, learned = "", []
        for message in messages:
            if message["role"] not in ("user", "assistant"):
                raise ValueError(f"no such role:\n{message['role']}")
            text += message["role"] + ":"
            if message["role"] == "assistant":
                learned.append((len(text), len(text) + len(message["content"]) + 4))
                text += message["content"] + "</s>|"
            else:
                text += message["content"] + "|"
        return ChatText(text, tuple(learned))
