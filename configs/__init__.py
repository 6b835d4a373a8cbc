"""Named configurations: each a few lines over another."""

from configs.doge import DOGE_20M, DOGE_60M, DOGE_160M, DOGE_320M
from configs.paper import PAPER_1_7B, PAPER_80M, PAPER_200M, PAPER_680M
from configs.quickstart import QUICKSTART
from train.config import TrainConfig

PRESETS: dict[str, TrainConfig] = {
    config.name: config
    for config in (
        QUICKSTART,
        DOGE_20M,
        DOGE_60M,
        DOGE_160M,
        DOGE_320M,
        PAPER_80M,
        PAPER_200M,
        PAPER_680M,
        PAPER_1_7B,
    )
}
