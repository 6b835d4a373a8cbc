"""Attention over fixed patterns: diagonals, verticals and a map of the first positions, per head. Imports jax only."""

from pallas_kernels.patterns.contract import Forward, Kept, Patterns, Places
from pallas_kernels.patterns.xla import pattern_attention

__all__ = ["Forward", "Kept", "Patterns", "Places", "pattern_attention"]
