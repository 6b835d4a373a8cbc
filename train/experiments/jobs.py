"""Several processes of one command that share a machine and a folder of results; what they compile is kept.

Small models leave a GPU idle while the host launches and compiles: several of them at once finish sooner.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from train.experiments.results import JOBS, RESULT
from train.interrupt import Interrupt
from train.monitor import say
from train.user_cache import user_cache

MEMORY_SHARE = 0.9


def is_job() -> bool:
    """Whether this process is one of several that `run_jobs` started."""
    return JOBS in os.environ


def environment_of(number: int, jobs: int, devices: Sequence[str]) -> dict[str, str]:
    """What the process of that number gets beside the environment: its accelerator and a share of its memory."""
    per_device = -(-jobs // max(len(devices), 1))
    own = {JOBS: str(per_device)}
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY_SHARE / per_device:.3f}"
    if len(devices) > 1:
        own["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    return own


def visible_gpus(environment: Mapping[str, str], folder: Path = Path("/dev")) -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, or those that the machine has; found without opening one."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    present = (path.name.removeprefix("nvidia") for path in folder.glob("nvidia[0-9]*"))
    return [str(index) for index, _ in enumerate(sorted(present, key=int))]


def run_jobs(args: Sequence[str], jobs: int, output: Path, cells: Sequence[str]) -> int:
    """Runs `dmattn <args>` in `jobs` processes, spread over the GPUs, until all have ended. Returns the exit code.

    Each takes the cells that no other has begun; what it says goes to `output/job-<number>.log`. SIGTERM and SIGINT are
    passed on, so that all save and end. cells: the folders below `output` that the bar counts.
    """
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "train.cli", *args]
    devices = visible_gpus(os.environ)
    say(f"{jobs} processes on {max(len(devices), 1)} devices; their logs are {output / 'job-*.log'}")
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        processes = []
        for number in range(jobs):
            log = stack.enter_context((output / f"job-{number}.log").open("w"))
            environment = os.environ | environment_of(number, jobs, devices)
            # In a session of its own: a Ctrl-C reaches it once, from here.
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            )
        bar = stack.enter_context(tqdm(total=len(cells), desc="done", unit="cell", file=sys.stderr, dynamic_ncols=True))
        told = False
        while any(process.poll() is None for process in processes):
            if interrupt.signal is not None and not told:
                for process in processes:
                    process.send_signal(interrupt.signal)
                told = True
            count_done(bar, output, cells)
            time.sleep(0.5)
        count_done(bar, output, cells)
    if (output / "table.md").exists():
        say((output / "table.md").read_text(encoding="utf-8"))
    codes = [process.returncode for process in processes]
    # One that a signal killed before it could say so ends as in a shell.
    failed = [(number, code if code > 0 else 128 - code) for number, code in enumerate(codes) if code]
    for number, code in failed:
        tail = (output / f"job-{number}.log").read_text(errors="replace").strip().splitlines()[-1:]
        say(f"process {number} ended with {code}: {' '.join(tail)} ({output / f'job-{number}.log'})")
    return failed[0][1] if failed else 0


def count_done(bar: tqdm, output: Path, cells: Sequence[str]) -> None:
    """Shows how many are done; drawn anew when that changes, and on a terminal every time, for its clock."""
    done = sum((output / cell / RESULT).exists() for cell in cells)
    if done != bar.n:
        bar.update(done - bar.n)
    elif sys.stderr.isatty():
        bar.refresh()


def keep_compiled() -> None:
    """Programs for accelerators are kept in the user's cache: another process, or this command again, compiles less.

    JAX_COMPILATION_CACHE_DIR names another folder.
    """
    if jax.default_backend() != "cpu" and not jax.config.values.get("jax_compilation_cache_dir"):
        jax.config.update("jax_compilation_cache_dir", str(user_cache("compiled")))
