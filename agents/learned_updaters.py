"""The updater network U of L2L-GAIL: an MLP over all parameters at once, learned as it is used.

Jiang et al. 2021, Learning to Defend by Learning to Attack, section 4 and appendix C. With the
paper's discriminator for CartPole (m = 2561) U has 52m² + 13m + 2 = 341 million weights. One
vector passes through it per update, so that its gradients are outer products that need not be
formed (`agents.outer_adam`): weights and Adam's moments are all that is resident.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from advgame.errors import InputError
from advgame.imitation.updater import Objective, Updater, check_positive
from advgame.seeding import stream
from agents.outer_adam import Moments, fill_uniform

Hidden = tuple[int, int] | None  # widths of the hidden layers; None is the paper's (8m, 4m)
_TINY = 1e-12  # what root mean squares are kept above


def layer_sizes(m: int, hidden: Hidden = None) -> list[tuple[int, int]]:
    """(outputs, inputs) of U's three layers; the paper's for ``hidden`` None."""
    first, second = hidden or (8 * m, 4 * m)
    return [(first, 2 * m), (second, first), (m, second)]


def parameter_count(m: int, hidden: Hidden = None) -> int:
    """Weights, biases and the two slopes of U: 52m² + 13m + 2 for the paper's."""
    return sum(rows * (columns + 1) for rows, columns in layer_sizes(m, hidden)) + 2


def needed_memory(m: int, hidden: Hidden = None) -> int:
    """Bytes that U and the two moments of its Adam take; also about the size of a checkpoint."""
    return 3 * 4 * parameter_count(m, hidden)


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


def check_memory(m: int, device: torch.device, hidden: Hidden = None) -> None:
    """Refuse a network for m parameters that would not fit on ``device``.

    Raises:
        InputError: how much is missing.
    """
    need, have = needed_memory(m, hidden), available_memory(device)
    if need > have:
        raise InputError(
            f"the updater network for {m} parameters needs {need / 1e9:.1f} GB and "
            f"{have / 1e9:.1f} GB are free: take a narrower one (hidden) or a larger machine"
        )


def rms(values: Tensor) -> Tensor:
    """Root mean square, kept above a tiny number so that it can be divided by."""
    return values.square().mean().sqrt().clamp_min(_TINY)


class MLPUpdater(Updater):
    """θ' = θ + U(θ, g), and U learns from the objective at θ' (Algorithm 3 of the paper).

    U is an MLP on [θ, g] (2m) with 8m and 4m hidden units, a learnable PReLU after each, and m
    outputs without activation. After each update the objective at θ' is backpropagated into U's
    weights alone (θ and g are constants), and Adam takes one step that LOWERS the objective. The
    paper's appendix has U minimise what the discriminator maximises; its section 4 says ascent,
    which is what is done here.

    With the options at their defaults this is the paper's; the initial weights, which it does not
    give, are uniform in ±1/√inputs, slopes 1/4. The options are ours:

    Args:
        lr: learning rate of U's Adam. One step moves U's output by about lr·Σ|h| over the last
            hidden layer: it has to shrink with the width.
        seed: of the initial weights.
        hidden: widths of a narrower U; None is the paper's (8m, 4m).
        zero_last: start the last layer at zero, so that the first update leaves θ as it is.
        scaling: ``"rms"`` divides θ and g by their root mean squares before U sees them.
        blocks: sizes of the parameter blocks whose gradients ``"rms"`` scales one by one; the
            whole vector when None.
        bound: α of an output α·tanh(U), so that no parameter moves by more than α. Not
            α·tanh(U/α): with a small α that saturates, its slope is 0 in float32, and U stops
            learning for good.
        leak: share of the last layer that is forgotten after each step.

    Raises:
        InputError: a setting out of range.
    """

    def __init__(
        self,
        lr: float = 0.01,
        *,
        seed: int,
        hidden: Hidden = None,
        zero_last: bool = False,
        scaling: Literal["raw", "rms"] = "raw",
        blocks: tuple[int, ...] | None = None,
        bound: float | None = None,
        leak: float = 0.0,
    ) -> None:
        check_positive(lr=lr, bound=1.0 if bound is None else bound)
        if hidden is not None and (len(hidden) != 2 or min(hidden) < 1):
            raise InputError(f"hidden must be two widths of at least 1, not {hidden}")
        if scaling not in ("raw", "rms"):
            raise InputError(f"scaling must be 'raw' or 'rms', not {scaling!r}")
        if blocks is not None and (not blocks or min(blocks) < 1):
            raise InputError(f"blocks must be sizes of at least 1, not {blocks}")
        if not 0 <= leak < 1:
            raise InputError(f"leak must lie in [0, 1), not {leak}")
        self.lr, self.hidden, self.zero_last, self.leak = lr, hidden, zero_last, leak
        self.scaling, self.blocks, self.bound = scaling, blocks, bound
        self._stream_seed = seed
        stream(seed, "updater")  # refuses a negative seed now
        self._layers: dict[str, Moments] = {}

    @property
    def description(self) -> str:
        """What this is, in a line; only the paper's U is called the paper's."""
        changes = [
            "last layer from zero" * self.zero_last,
            "inputs by their rms" * (self.scaling == "rms"),
            f"bound {self.bound}" * (self.bound is not None),
            f"leak {self.leak}" * (self.leak > 0),
        ]
        if self.hidden is None:
            name = "full MLP 2m-8m-4m-m" if any(changes) else "the paper's MLP 2m-8m-4m-m"
        else:
            name = f"narrow MLP 2m-{self.hidden[0]}-{self.hidden[1]}-m (not the paper's)"
        return ", ".join(filter(None, [name, *changes]))

    def __repr__(self) -> str:
        return f"<MLPUpdater: {self.description}>"

    @override
    def check_room(self, size: int, folder: Path) -> None:
        check_memory(size, torch.device("cpu"), self.hidden)
        need, have = 3 * needed_memory(size, self.hidden), available_disk(folder)
        if need > have:
            raise InputError(
                f"3 checkpoints of the updater need {need / 1e9:.1f} GB and {folder} has "
                f"{have / 1e9:.1f} GB: free some, or take a narrower updater"
            )

    @override
    def begin(self, params: Tensor) -> None:
        """Draw U anew.

        Raises:
            InputError: no float32, blocks that do not add up to m, or too little memory for U;
                nothing is allocated then.
        """
        self._allocate(params)
        rng = stream(self._stream_seed, "updater")
        for name, layer in self._layers.items():
            layer.mean.zero_()
            layer.square.zero_()
            if name.startswith("slope"):
                layer.value.fill_(0.25)
            elif self.zero_last and name.endswith("3"):
                layer.value.zero_()
            else:
                inputs = self._layers[f"weight{name[-1]}"].value.shape[1]
                fill_uniform(layer.value, 1 / math.sqrt(inputs), rng)
        self._steps = 0

    def _allocate(self, params: Tensor) -> None:
        """Memory for U and its moments, unless it is there."""
        m, device = len(params), params.device
        if params.dtype != torch.float32:
            raise InputError(f"the MLP updater takes float32 parameters, not {params.dtype}")
        if self.blocks is not None and sum(self.blocks) != m:
            raise InputError(f"blocks add up to {sum(self.blocks)}, there are {m} parameters")
        last = self._layers.get("bias3")
        if last is not None and len(last.value) == m and last.value.device == device:
            return
        self._layers = {}
        check_memory(m, device, self.hidden)
        for number, (rows, columns) in enumerate(layer_sizes(m, self.hidden), 1):
            self._layers[f"weight{number}"] = Moments.zeros(rows, columns, device)
            self._layers[f"bias{number}"] = Moments.zeros(rows, 1, device)
        for number in (1, 2):
            self._layers[f"slope{number}"] = Moments.zeros(1, 1, device)

    @override
    def step(
        self, params: Tensor, grad: Tensor, objective: Objective
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """θ' = θ + U(θ, g) from the U of before its step, then one step of U."""
        layers = self._layers
        with torch.enable_grad():
            x = self._inputs(params, grad)
            slopes = [layers[f"slope{k}"].value[0].requires_grad_() for k in (1, 2)]
            # leaves here: the graph holds the activations, whose gradients δ are all that is needed
            first = self._linear(1, x).requires_grad_()
            hidden1 = F.prelu(first, slopes[0])
            second = self._linear(2, hidden1)
            hidden2 = F.prelu(second, slopes[1])
            third = self._linear(3, hidden2)
            step = third if self.bound is None else self.bound * third.tanh()
            new_loss = objective(params + step)
            deltas = torch.autograd.grad(new_loss, [first, second, third, *slopes])
        one = torch.ones(1, device=params.device)
        sources = [x, hidden1.detach(), hidden2.detach()]
        norm = torch.zeros((), device=params.device)
        for k, (delta, source) in enumerate(zip(deltas[:3], sources, strict=True), 1):
            norm += delta.square().sum() * (source.square().sum() + 1)
            layers[f"weight{k}"].adam(delta, source, self.lr, self._steps)
            layers[f"bias{k}"].adam(delta, one, self.lr, self._steps)
        for k, delta in enumerate(deltas[3:], 1):
            norm += delta.square().sum()
            layers[f"slope{k}"].adam(delta, one, self.lr, self._steps)
        self._steps += 1
        if self.leak:
            layers["weight3"].value.mul_(1 - self.leak)
            layers["bias3"].value.mul_(1 - self.leak)
        stats = {
            "updater/loss": new_loss.detach(),
            "updater/gradient_norm": norm.sqrt(),
            "updater/step": step.detach().norm(),
        }
        return params + step.detach(), stats

    def _inputs(self, params: Tensor, grad: Tensor) -> Tensor:
        """What U is given (2m,): parameters and gradient, scaled."""
        if self.scaling == "raw":
            return torch.cat([params, grad])
        parts = grad.split(self.blocks or (len(grad),))
        return torch.cat([params / rms(params), *(part / rms(part) for part in parts)])

    def _linear(self, number: int, inputs: Tensor) -> Tensor:
        weight, bias = self._layers[f"weight{number}"], self._layers[f"bias{number}"]
        return torch.addmv(bias.value[:, 0], weight.value, inputs)

    @override
    def saved(self) -> dict[str, Any]:
        """U, the moments of its Adam and the number of steps.

        The tensors are the live ones (4 GB at the paper's size): save them before the next update.
        """
        tensors = {
            name: [layer.value, layer.mean, layer.square] for name, layer in self._layers.items()
        }
        return {"layers": tensors, "steps": self._steps}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        """As `Updater` has it.

        Raises:
            InputError: the state of a U of other widths, or too little memory.
        """
        saved = state["layers"]
        bias = saved["bias3"][0]
        target = self._layers["bias3"].value if self._layers else bias
        sizes = [tuple(saved[f"weight{k}"][0].shape) for k in (1, 2, 3)]
        if sizes != layer_sizes(len(bias), self.hidden):
            raise InputError(f"this is the state of an updater of other widths: {sizes}")
        self._allocate(torch.empty(len(bias), device=target.device))
        for name, layer in self._layers.items():
            for own, other in zip(
                (layer.value, layer.mean, layer.square), saved[name], strict=True
            ):
                own.copy_(other)
        self._steps = state["steps"]
