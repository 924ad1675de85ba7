"""How much memory and disk is left, to refuse what cannot fit before it starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` without pushing anything out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_disk(path: Path) -> int:
    """Bytes free where ``path`` is, or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gigabytes(count: int) -> str:
    """A number of bytes for a person."""
    return f"{count / 1e9:.1f} GB"
