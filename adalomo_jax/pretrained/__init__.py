"""Reading and writing of checkpoints in the formats that others publish."""

from adalomo_jax.pretrained.chat import ChatText as ChatText
from adalomo_jax.pretrained.gguf_tokenizer import tokenizer_of_gguf as tokenizer_of_gguf
from adalomo_jax.pretrained.tokenizer import ByteTokenizer as ByteTokenizer
from adalomo_jax.pretrained.tokenizer import Encoded as Encoded
from adalomo_jax.pretrained.tokenizer import TextTokenizer as TextTokenizer
from adalomo_jax.pretrained.tokenizer import Tokenizer as Tokenizer
from adalomo_jax.pretrained.tokenizer_files import read_tokenizer as read_tokenizer
