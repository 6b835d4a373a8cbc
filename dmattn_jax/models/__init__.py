"""Language models."""

from dmattn_jax.models.config import DogeConfig
from dmattn_jax.models.doge import DogeForCausalLM
from dmattn_jax.models.loss import LossOutput

__all__ = ["DogeConfig", "DogeForCausalLM", "LossOutput"]
