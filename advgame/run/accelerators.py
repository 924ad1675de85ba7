"""What this machine computes with: a GPU, bf16 on its CPU; asks without importing torch."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path


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
