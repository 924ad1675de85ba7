"""The defender of a game: a classifier with its optimiser, behind Lightning Fabric."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advgame.attacks.boundary import attacked, precision
from advgame.attacks.folding import folding
from advgame.attacks.input_gradients import input_gradient
from advgame.classifiers.foreign import frozen_copy
from advgame.errors import InputError
from advgame.health import note_gradient
from advgame.losses import smoothed_cross_entropy
from advgame.optimizers import load_optimizer
from advgame.seeding import PrivateRNG

DefenderLoss = Callable[[nn.Module], Tensor]
"""The classifier, as it is to be called, -> its loss per image (B,)."""


TICKS = 10_000
"""The unit of schedules where a training has a budget instead of epochs: so many are all of it."""


class Defender:
    """A classifier that learns by SGD, or by Adam where the paper has it.

    Attacks use `module`, the bare classifier; the learning step goes through Fabric's wrapper,
    which averages gradients over processes.

    Args:
        module: the classifier; moved to Fabric's device.
        lr: learning rate.
        momentum: SGD's momentum.
        weight_decay: of the optimiser.
        true_probability: label smoothing, `advgame.losses.smoothed_cross_entropy`.
        grad_clip: largest gradient norm; None does not clip.
        fabric: device, precision and processes; one CPU process when None.
        algorithm: ``"sgd"``, or ``"adam"`` with its usual moments.

    Raises:
        InputError: another algorithm, or a classifier that has nothing to learn.
    """

    descents = 1
    """gradients that the last `descend` formed, each by the passes of its loss"""

    spent: float | None = None
    """share of the budget that is spent, where the training has one instead of epochs"""

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        true_probability: float = 1.0,
        grad_clip: float | None = None,
        fabric: Fabric | None = None,
        algorithm: Literal["sgd", "adam"] = "sgd",
    ) -> None:
        self.fabric = fabric or Fabric(accelerator="cpu", devices=1)
        self.true_probability, self.grad_clip = true_probability, grad_clip
        if algorithm not in ("sgd", "adam"):
            raise InputError(f"unknown algorithm {algorithm!r}: choose sgd or adam")
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError(
                f"this {type(module).__name__} has no weights that learn: call "
                "requires_grad_(True) on it; quantised and frozen modules can be attacked only"
            )
        with attacked(module, "train"):
            pass  # refuses what has no such mode
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(
                module.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
            )
            if algorithm == "sgd"
            else torch.optim.Adam(module.parameters(), lr=lr, weight_decay=weight_decay)
        )
        self.module, self.optimizer = module, optimizer
        self._set_up()

    def clock(self, made: int) -> int:
        """How far the training is in the unit of its schedules: `TICKS` of a budget, or steps.

        Args:
            made: steps so far, as the schedule counts them.
        """
        return made if self.spent is None else round(self.spent * TICKS)

    def _set_up(self) -> None:
        wrapped, wrapped_optimizer = self.fabric.setup(self.module, self.optimizer)
        self._wrapped, self._wrapped_optimizer = wrapped, cast(Any, wrapped_optimizer)
        self._shadow: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Fabric's wrappers and the look-ahead's copy are made anew on the other side."""
        derived = ("_wrapped", "_wrapped_optimizer", "_shadow")
        return {name: value for name, value in vars(self).items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_up()

    @property
    def device(self) -> torch.device:
        """The device that holds the classifier's weights."""
        return self.fabric.device

    @contextlib.contextmanager
    def under_attack(self) -> Iterator[None]:
        """Within the block a training's attack asks the classifier: in the training's precision.

        Batch norm is folded there (`advgame.attacks.folding`): rounding is all that differs.
        """
        with self.fabric.autocast(), folding():
            yield

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss that the defender minimises, per image (B,)."""
        return smoothed_cross_entropy(logits, y, self.true_probability)

    def backward(self, x: Tensor, y: Tensor, sensitivity: float = 0.0) -> Tensor:
        """Form the gradient of the mean loss on (x, y) in training mode; returns it (B,).

        Args:
            x: (B, C, H, W).
            y: (B,).
            sensitivity: s adds s/2 ‖∂loss/∂x‖² of each image to its loss, by a second backward
                pass through the first; on one device.
        """
        if not sensitivity:
            return self.descend(lambda model: self.loss(model(x), y))
        self._wrapped.train()
        self._wrapped_optimizer.zero_grad()
        x = x.detach().requires_grad_()
        # Fabric's wrapper allows one backward pass only
        with self.fabric.autocast():
            losses = self.loss(self.module(x), y)
        gradient = input_gradient(losses.sum(), x, create_graph=True)
        penalty = gradient.square().flatten(1).sum(1).mean()
        self.fabric.backward(losses.mean() + sensitivity / 2 * penalty)
        return losses.detach()

    def descend(self, loss: DefenderLoss) -> Tensor:
        """Form the gradient of any mean loss in training mode; returns the loss per image (B,).

        Args:
            loss: maps the classifier to its loss per image; calls it and nothing else that
                learns, so that it can be asked again at other weights.
        """
        self._wrapped.train()
        self._wrapped_optimizer.zero_grad()
        losses = loss(self._wrapped)
        self.fabric.backward(losses.mean())
        if all(parameter.grad is None for parameter in self.module.parameters()):
            raise InputError(
                f"no gradient reaches the weights of this {type(self.module).__name__}: does it "
                "detach its logits, or are its last layers quantised?"
            )
        return losses.detach()

    def look_ahead(self) -> nn.Module:
        """The classifier after one fresh SGD step along the gradient that `backward` formed.

        LAS-AT's look-ahead: a copy with a new optimiser (no momentum yet, same learning rate and
        weight decay) makes one step on the adversarial examples. The defender's own step uses
        the same examples, loss and mode, so its gradient is the copy's too and is formed once.
        Like such a copy it does not clip its gradient. The real defender is untouched; the
        module returned is overwritten by the next call.

        Raises:
            InputError: a defender that does not learn by SGD: one step of Adam is another thing.
        """
        shadow = self.check_look_ahead()
        group = self.optimizer.param_groups[0]
        with torch.no_grad():
            for ahead, parameter in zip(shadow.parameters(), self.module.parameters(), strict=True):
                ahead.copy_(parameter)
                if parameter.grad is not None:
                    decayed = parameter.grad + group["weight_decay"] * parameter
                    ahead.add_(decayed, alpha=-group["lr"])
            for there, here in zip(shadow.buffers(), self.module.buffers(), strict=True):
                there.copy_(here)
        return shadow.eval()

    def check_look_ahead(self) -> nn.Module:
        """The look-ahead's copy of the classifier, made once; a game that pays asks beforehand.

        Raises:
            InputError: as `look_ahead`, or a classifier that cannot be copied.
        """
        if not isinstance(self.optimizer, torch.optim.SGD):
            raise InputError("the look-ahead is a step of SGD: the defender must learn by it")
        if self._shadow is None:
            self._shadow = frozen_copy(self.module, "the look-ahead is a step of a copy")
        return self._shadow

    def check_batch(self, x: Tensor) -> None:
        """Refuse batches that the classifier cannot learn from, before any work.

        A batch of one image is tried: batch norm in training mode needs more than one value per
        channel. So are weights that are not all fp32: attacks cast their images for such a
        network, a training does not. Nothing is changed, nothing drawn.

        Args:
            x: the images of a batch, (B, C, H, W).

        Raises:
            InputError: what the classifier says of one image in training mode, or of fp32 images.
        """
        if precision(self.module) != torch.float32:
            self._check_precision(x[:2])
        if len(x) > 1:
            return
        try:
            with attacked(self.module, "train"), PrivateRNG(0, self.device), torch.no_grad():
                self.module(x)
        except ValueError as error:
            raise InputError(
                f"the classifier cannot learn from batches of one image ({error}): take more "
                "images per batch, e.g. gymnasium.make_vec(id, num_envs=64), or a network without "
                "batch norm"
            ) from error

    def _check_precision(self, x: Tensor) -> None:
        """Refuse weights of another precision whose network does not cast fp32 images itself."""
        alone = contextlib.ExitStack()
        alone.enter_context(attacked(self.module, "train"))
        alone.enter_context(PrivateRNG(0, self.device))
        with alone, torch.no_grad(), self.fabric.autocast():
            try:
                self.module.forward(x)  # past the hook by which an attack casts its images
            except RuntimeError as error:
                kinds = sorted({str(one.dtype) for one in self.module.parameters()})
                raise InputError(
                    f"the classifier has weights of {', '.join(kinds)} and learns from fp32 images "
                    f"({error}): call .float() on it, or let its forward cast them"
                ) from error
            except ValueError:  # batch norm's, of one image
                return

    def step(self) -> None:
        """The optimiser's step along the gradient that `backward` formed, clipped."""
        if self.grad_clip is not None:
            self.fabric.clip_gradients(
                self._wrapped, self._wrapped_optimizer, max_norm=self.grad_clip
            )
        note_gradient(self.optimizer)
        self._wrapped_optimizer.step()
        if self.fabric.world_size > 1:
            share_statistics(self.module, self.fabric)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser state, the live tensors; weights are saved apart, as safetensors."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimiser's state, which `state_dict` returned; it is copied."""
        load_optimizer(self.optimizer, state["optimizer"])


@torch.no_grad()
def share_statistics(module: nn.Module, fabric: Fabric) -> None:
    """Average batch norm's statistics over the processes, each of which saw its own images.

    All of them attack the same network then, or by the same one.

    Args:
        module: the network, whose statistics are replaced.
        fabric: the processes.
    """
    norms = (one for one in module.modules() if isinstance(one, _BatchNorm))
    buffers = [b for one in norms for b in one.buffers() if b.is_floating_point()]
    if buffers:
        flat = torch.cat([one.flatten() for one in buffers])
        mean = cast(Tensor, fabric.all_reduce(flat))
        for one, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            one.copy_(part.view_as(one))
