"""Ladders of the scaling experiment. The paper's own four sizes are the presets of `configs/paper.py`."""

from train.experiments.scaling_config import ScalingSweep

LADDER_20M = ScalingSweep()
"""Six sizes to 19M parameters, on the code and prose of installed packages: minutes a run on one GPU."""
