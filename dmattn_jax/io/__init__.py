"""Files in and out: models (safetensors, GGUF), tokenizers, chat templates."""

from dmattn_jax.io.chat_template import ChatTemplate
from dmattn_jax.io.errors import CheckpointFormatError, HubError
from dmattn_jax.io.pretrained import load_pretrained, save_pretrained
from dmattn_jax.io.tokenizer_files import load_pretrained_tokenizer, load_tokenizer
from dmattn_jax.io.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, train_tokenizer

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "CheckpointFormatError",
    "FileTokenizer",
    "HubError",
    "Tokenizer",
    "load_pretrained",
    "load_pretrained_tokenizer",
    "load_tokenizer",
    "save_pretrained",
    "train_tokenizer",
]
