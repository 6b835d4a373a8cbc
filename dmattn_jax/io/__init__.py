"""Files in and out: tokenizers."""

from dmattn_jax.io.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_tokenizer

__all__ = ["ByteTokenizer", "FileTokenizer", "Tokenizer", "load_tokenizer", "train_tokenizer"]
