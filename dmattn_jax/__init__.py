"""Dynamic-mask attention in JAX."""
