"""Text to batches: sources, tokens, held-out documents, packing, and the state that resumes exactly."""

from train.data.batches import TrainIterator
from train.data.held_out import HeldOut
from train.data.loader import Datasets, make_datasets, make_evaluation, training_texts
from train.data.sources import DataError

__all__ = [
    "DataError",
    "Datasets",
    "HeldOut",
    "TrainIterator",
    "make_datasets",
    "make_evaluation",
    "training_texts",
]
