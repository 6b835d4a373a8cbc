"""XLA's flags where programs run once, and compiling them is nearly all of the time."""

import jax

FLAGS = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    # A third of its compile time; later versions have no other way to write fusions, nor the flag.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
