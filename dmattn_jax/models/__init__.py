"""Language models."""

from dmattn_jax.models.config import DogeConfig
from dmattn_jax.models.decoder import CausalDecoder
from dmattn_jax.models.doge import DogeForCausalLM
from dmattn_jax.models.llama import LlamaForCausalLM
from dmattn_jax.models.llama_config import LlamaConfig
from dmattn_jax.models.loss import LossOutput

__all__ = ["CausalDecoder", "DogeConfig", "DogeForCausalLM", "LlamaConfig", "LlamaForCausalLM", "LossOutput"]
