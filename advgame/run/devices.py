"""Devices, processes and precision: Lightning Fabric as every script has it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from typing_extensions import override

from advgame.errors import InputError

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others, where they are silent; an end of one is seen at once."""


class _Bf16Mixed(MixedPrecision):
    """bf16 where autocast says so. Fabric's own also rounds the images, by up to 0.5/255.

    The classifier would then not learn from the images that the attack made.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    @override
    def convert_input(self, data: Any) -> Any:
        return data


def check_devices(accelerator: str, devices: int) -> None:
    """Refuse more processes than there are CPUs; Fabric itself refuses more GPUs than there are.

    Raises:
        InputError: how many there are.
    """
    there = os.cpu_count() or 1
    if devices > there and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise InputError(
            f"--devices {devices}: a process each, and this machine has {there} CPU(s): ask for "
            "no more than those"
        )


def make_fabric(accelerator: str, devices: int, precision: str, nodes: int = 1) -> Fabric:
    """Launch Lightning Fabric.

    ``accelerator="auto"`` is CUDA where there is one, else the CPU; ``precision="auto"`` is
    bf16-mixed on CUDA, else 32-true. What is not bf16 is fp32: cuDNN's TF32, with three digits,
    is switched off for the process.

    Args:
        accelerator: one that Fabric knows.
        devices: processes on each machine.
        precision: one that Fabric knows.
        nodes: machines; on several, torchrun or SLURM has started the processes.

    Raises:
        InputError: a device or precision that is not there.
    """
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    how: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "num_nodes": nodes}
    try:
        kind = Fabric(accelerator=accelerator, devices=devices).device.type
        if precision == "auto":
            precision = "bf16-mixed" if kind == "cuda" else "32-true"
        half = precision == "bf16-mixed"
        how |= {"plugins": [_Bf16Mixed(kind)] if half else []}
        how |= {} if half else {"precision": precision}
        if devices * nodes > 1:
            how["strategy"] = DDPStrategy(timeout=PATIENCE)
        else:  # alone, also where a launcher's variables tell of others
            how["plugins"].append(LightningEnvironment())
        fabric = Fabric(**how)
        fabric.launch()
    except Exception as error:  # Fabric raises its own kinds for devices that are not there
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot use accelerator {accelerator!r} x {devices}: {reason}") from error
    return fabric


def left_alone(error: RuntimeError) -> bool:
    """Whether an error of a collective says that another process has ended, or is silent."""
    told = str(error)
    return isinstance(error, torch.distributed.DistError) or any(
        word in told for word in ("gloo", "Gloo", "NCCL", "ProcessGroup")
    )
