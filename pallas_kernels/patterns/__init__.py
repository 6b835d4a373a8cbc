"""Attention over fixed patterns: diagonals, verticals and a map of the first positions, per head. Imports jax only."""

from pallas_kernels.patterns.contract import Forward, Implementation, Kept, Patterns, Places
from pallas_kernels.patterns.dispatch import IMPLEMENTATIONS, pattern_attention

__all__ = ["IMPLEMENTATIONS", "Forward", "Implementation", "Kept", "Patterns", "Places", "pattern_attention"]
