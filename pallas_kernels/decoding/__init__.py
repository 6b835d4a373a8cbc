"""One step of decoding with a bounded cache: evict, insert, attend (`contract`), per kind of device."""

from pallas_kernels.decoding.contract import EMPTY, Implementation, Slots
from pallas_kernels.decoding.dispatch import IMPLEMENTATIONS, decode_step, room_for

__all__ = ["EMPTY", "IMPLEMENTATIONS", "Implementation", "Slots", "decode_step", "room_for"]
