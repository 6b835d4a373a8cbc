"""A run small enough to train many times in a test, and a way to train it in a process of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import quick_compilation

from dmattn_jax.models.config import DogeConfig
from train.config import CheckpointConfig, DataConfig, LogConfig, MeshConfig, OptimizerConfig, TrainConfig
from train.config_json import to_json

ROOT = Path(__file__).parents[1]
STEPS = 14
RUN = """
import sys
from pathlib import Path
import configs
from train import cli, config_json
config = config_json.load(Path(sys.argv[1]))
configs.PRESETS[config.name] = config
sys.exit(cli.main(["train", config.name]))
"""


def write_corpus(folder: Path) -> Path:
    """Twenty-three files of words, the same in every test."""
    folder.mkdir(parents=True)
    generator = random.Random(7)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 7))) for _ in range(61)]
    for number in range(23):
        (folder / f"{number}.txt").write_text(" ".join(generator.choices(words, k=211)), encoding="utf-8")
    return folder


def small_config(folder: Path, name: str = "small", **changes: object) -> TrainConfig:
    """A byte-level model of two layers; corpus and runs below `folder`."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    config = TrainConfig(
        name=name,
        model=DogeConfig(
            vocab_size=257,
            hidden_size=24,
            intermediate_size=40,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            window=7,
            dtype="float32",
        ),
        data=DataConfig(source=str(corpus), validation_fraction=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        mesh=MeshConfig(data=1),
        checkpoint=CheckpointConfig(every=5, keep=2),
        log=LogConfig(every=1, eval_every=5, eval_batches=2, sample_every=0),
        sequence_length=29,
        batch_size=4,
        steps=STEPS,
        runs_dir=str(folder / "runs"),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def environment(devices: int | None = None) -> dict[str, str]:
    """For a child process on the CPU; one with several devices compiles in less time, to slower programs."""
    flags = f"{quick_compilation.FLAGS} --xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        **({"XLA_FLAGS": flags} if devices else {}),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONUNBUFFERED": "1",
    }


def start(config: TrainConfig, folder: Path) -> subprocess.Popen[str]:
    """`dmattn train` of this configuration, in a process of its own."""
    path = folder / f"{config.name}.json"
    path.write_text(to_json(config), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(path)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
