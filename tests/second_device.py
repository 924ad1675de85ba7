"""Run scripts on the simulated second device of second_device.cpp, in a process of their own.

    python tests/second_device.py FOLDER JOBS.json

A job is ``{"words": [script, option, ...], "stop_at": step or null}``; SIGTERM comes after that
step. What each came to, its error or null, goes to FOLDER/results.json.
"""

import ctypes
import importlib.machinery
import importlib.util
import json
import runpy
import signal
import subprocess
import sys
import sysconfig
import traceback
import types
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from safetensors import torch as safetensors_torch
from torch.utils.cpp_extension import include_paths, library_paths

NAME, SOURCE = "second", Path(__file__).with_suffix(".cpp")
ROOT = SOURCE.parent.parent


def build(folder: Path) -> Path:
    """Compile the device; a minute."""
    made = folder / "second_device.so"
    if not made.exists():
        include = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
        linked = [f"-L{path}" for path in library_paths()]
        words = ["c++", "-O1", "-w", "-shared", "-fPIC", "-std=c++20", *include, str(SOURCE)]
        words += ["-DTORCH_EXTENSION_NAME=second_device", "-DTORCH_API_INCLUDE_EXTENSION_H"]
        words += [*linked, "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-o", str(made)]
        subprocess.run(words, check=True)
    return made


def register(library: Path) -> None:
    """Make ``torch.device("second")`` known to this process."""
    loader = importlib.machinery.ExtensionFileLoader("second_device", str(library))
    spec = importlib.util.spec_from_loader("second_device", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.register()
    torch.utils.rename_privateuse1_backend(NAME)
    backend = types.ModuleType(f"torch.{NAME}")
    vars(backend).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    torch._register_device_module(NAME, backend)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    # CUDA keeps the parameters' identity when a module moves; other devices only so
    torch.__future__.set_swap_module_params_on_conversion(True)


def fill_gaps() -> None:
    """What PyTorch and safetensors do for CUDA's memory and not for a device of a stranger."""
    copy_storage, copy_tensor = torch.UntypedStorage.copy_, torch.Tensor.__deepcopy__
    copy_parameter, save = torch.nn.Parameter.__deepcopy__, safetensors_torch.save_file

    def copy(self, source, *rest):
        if NAME not in (self.device.type, source.device.type):
            return copy_storage(self, source, *rest)
        ctypes.memmove(self.data_ptr(), source.data_ptr(), self.nbytes())
        return self

    def deepcopy(self, memo):
        if self.device.type != NAME:
            parameter = isinstance(self, torch.nn.Parameter)
            return (copy_parameter if parameter else copy_tensor)(self, memo)
        if id(self) not in memo:
            new = torch.empty_strided(self.size(), self.stride(), dtype=self.dtype, device=NAME)
            new.copy_(self.detach())
            if isinstance(self, torch.nn.Parameter):
                new = torch.nn.Parameter(new, self.requires_grad)
            memo[id(self)] = new
        return memo[id(self)]

    torch.UntypedStorage.copy_ = copy
    torch.Tensor.__deepcopy__ = torch.nn.Parameter.__deepcopy__ = deepcopy
    safetensors_torch.save_file = lambda tensors, *rest, **more: save(
        {name: value.detach().cpu() for name, value in tensors.items()}, *rest, **more
    )


class Accelerator(CPUAccelerator):
    """Fabric's view of the device."""

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, 0)]

    def setup_device(self, device):
        """Nothing to set up."""


def make_fabric(accelerator, devices, precision, nodes=1):
    strategy = SingleDeviceStrategy(torch.device(NAME, 0), accelerator=Accelerator())
    fabric = Fabric(strategy=strategy, devices=1, precision="32-true")
    fabric.launch()
    return fabric


def play(words, stop_at):
    """A script as a process would run it; returns its error, or None."""
    from advgame.run.loop import Trainer

    step = Trainer._one_step

    def stopping(trainer):
        stats = step(trainer)
        if trainer.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return stats

    Trainer._one_step, sys.argv = stopping, list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return None if stop_at and end.code == 128 + signal.SIGTERM else f"exit code {end.code}"
    except Exception as error:  # the test shows it, and where; the other jobs go on
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{one.filename}:{one.lineno}" for one in frames if ".venv" not in one.filename]
        return f"{type(error).__name__}: {error} ({', '.join(ours)})"
    finally:
        Trainer._one_step = step
    return None


def refusals():
    """Words of what the device must refuse; an empty string where it does not."""
    ours, theirs = torch.ones(2, 2, device=NAME), torch.ones(2, 2)
    said = []
    for job in (
        lambda: ours + theirs,
        lambda: torch.where(ours > 0, ours, theirs),
        lambda: torch.rand(2, device=NAME, generator=torch.Generator()),
        lambda: ours.numpy(),
    ):
        try:
            job()
            said.append("")
        except (RuntimeError, TypeError) as error:
            said.append(str(error))
    return said


def main() -> None:
    folder, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    register(build(folder))
    fill_gaps()
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    torch.set_num_threads(1)
    from advgame.run import cli, devices

    devices.make_fabric, cli.run_script = make_fabric, lambda job, stopped="": job()
    results = {" ".join(job["words"]): play(**job) for job in jobs}
    text = json.dumps({"jobs": results, "refusals": refusals()}, indent=1)
    (folder / "results.json").write_text(text)


if __name__ == "__main__":
    main()
