"""What a job computes with: GPUs, bf16 on the CPU, other processes; imports no torch to ask."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from advgame.errors import InputError


def has_cuda() -> bool:
    """Whether CUDA's driver sees a device that this process may use."""
    return cuda_devices() > 0


@functools.cache
def cuda_devices() -> int:
    """How many devices CUDA's driver sees that this process may use."""
    count = ctypes.c_int()
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        ready = not driver.cuInit(0) and not driver.cuDeviceGetCount(count)
        return count.value if ready else 0
    return 0


@functools.cache
def has_bf16() -> bool:
    """Whether the CPU computes faster in bf16 than in fp32.

    With AVX512-BF16 AMD's do (seen on Zen 4). Intel's need AMX: without it they take longer
    (docs/gpu.md). Others only emulate bf16.
    """
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        return False
    return "amx_bf16" in flags or {"avx512_bf16", "AuthenticAMD"} <= flags


def on_cpu(accelerator: str) -> bool:
    """Whether ``--accelerator`` means the CPU on this machine."""
    return accelerator == "cpu" or (accelerator == "auto" and not has_cuda())


def check_world(nodes: int, devices: int) -> None:
    """Refuse a launcher that has started other processes than the settings speak of.

    Each would train a copy of its own else, or wait for ever for the others.

    Raises:
        InputError: what was started, and what to type.
    """
    launcher, count = "torchrun", os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        launcher, count = "srun", os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if not count:
        if nodes > 1:
            raise InputError(
                f"--nodes {nodes}: start it on each machine by torchrun or srun (docs/cluster.md)"
            )
        return
    if int(count) != nodes * devices:
        raise InputError(
            f"{launcher} has started {count} process(es), and --nodes {nodes} times --devices "
            f"{devices} is {nodes * devices}: --devices is how many there are on each machine"
        )
