"""PGD beside other libraries' and beside the bare model; LAS-AT's attacks beside a masked loop."""

from __future__ import annotations

import copy
from contextlib import suppress

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.autograd import grad

from advgame.attacks import attacked, pgd
from advgame.attacks.folding import folding
from advgame.games.las_at import LasAt
from advgame.games.strategy import Strategies, StrategySpace
from advgame.seeding import stream
from advgame.threat import Linf, per_image
from agents.las_at import RandomStrategy
from benchmarks.timing import SEED, STEPS, WARM_UP, Case, Play, Shape, compare, task

Network = tuple[str, Shape, float, int, int]
# classifier, shape of the images, ε, batch for PGD-10, batch for steps per image
NETWORKS: list[Network] = [
    ("small_cnn", (1, 28, 28), 0.3, 64, 128),
    ("resnet18", (3, 32, 32), 8 / 255, 32, 64),
    ("preact_resnet18", (3, 32, 32), 8 / 255, 128, 128),  # from here on with a GPU only
    ("wrn-34-10", (3, 32, 32), 8 / 255, 128, 128),
]
PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")


def peer(name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Play:
    """PGD of step size ε/4 from a random start, by another library and in its own manner.

    Args:
        name: torchattacks, foolbox or adversarial-robustness-toolbox.
        model: in evaluation mode, of 10 classes.
        x: images (B, C, H, W) in [0, 1].
        y: labels (B,).
        eps: radius.
        steps: of the attack.

    Returns:
        a call without arguments that attacks; raises ImportError where the library is missing.
    """
    if name == "torchattacks":
        from torchattacks import PGD

        madry = PGD(model, eps=eps, alpha=eps / 4, steps=steps, random_start=True)
        return lambda: madry(x, y)
    if name == "foolbox":
        from foolbox.attacks import LinfPGD
        from foolbox.models.pytorch import PyTorchModel

        wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
        linf_pgd = LinfPGD(abs_stepsize=eps / 4, steps=steps, random_start=True)
        return lambda: linf_pgd.run(wrapped, x, y, epsilon=eps)
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model.register_forward_hook(lambda *call: call[2].float())  # NumPy knows no bf16
    about = {"input_shape": x.shape[1:], "nb_classes": 10, "clip_values": (0.0, 1.0)}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), **about)
    settings = {"max_iter": steps, "num_random_init": 1, "batch_size": len(x), "verbose": False}
    art = ProjectedGradientDescentPyTorch(classifier, eps=eps, eps_step=eps / 4, **settings)
    images, labels = x.cpu().numpy(), y.cpu().numpy()  # ART takes and gives NumPy
    return lambda: art.generate(images, labels)


def measure_pgd(fabric: Fabric, repeats: int, network: Network) -> Case:
    """Floor, ours and the peers with the same ε, step size, steps, random start and batch."""
    name, shape, eps, batch, _ = network
    model, x, y = task(name, shape, batch, fabric.device)
    attack, rng = pgd(Linf(eps), STEPS), stream(SEED, "start", fabric.device)
    bare, leaf = copy.deepcopy(model).requires_grad_(False), x.clone().requires_grad_()

    def in_training() -> Tensor:
        with folding():
            return attack.run(model, x, y, rng=rng, check=False).x_adv

    plays: dict[str, Play] = {
        "floor": lambda: [grad(F.cross_entropy(bare(leaf), y), leaf) for _ in range(STEPS)],
        "advgame": lambda: attack.perturb(model, x, y, rng=rng),
        "advgame unchecked": lambda: attack.run(model, x, y, rng=rng, check=False),
        "advgame in training": in_training,  # batch norm folded
    }
    for other in PEERS:
        with suppress(ImportError):  # on copies: some leave weight gradients behind
            plays[other] = peer(other, copy.deepcopy(model), x, y, eps, STEPS)
    rows = compare(plays, repeats, WARM_UP, fabric.autocast)
    missing = {other: "pip install -e '.[bench]'" for other in PEERS if other not in plays}
    facts = {"batch": batch, "eps": eps, "step_size": eps / 4, "steps": STEPS}
    return {"network": name, "shape": shape, **facts, "not_installed": missing, "contestants": rows}


def masked_loop(
    model: nn.Module, x: Tensor, y: Tensor, strategies: Strategies, rng: torch.Generator
) -> Tensor:
    """LAS-AT's published loop, vectorised: all run to the maximum, moves too many are masked."""
    ball, size = Linf(strategies.eps), per_image(strategies.step_size, x)
    x_adv = ball.random_start(x, rng)
    with attacked(model):
        for step in range(int(strategies.steps.max())):
            leaf = x_adv.detach().requires_grad_()
            (slope,) = grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
            moved = ball.project(ball.steepest(slope).mul_(size).add_(x_adv), x)
            x_adv = torch.where((strategies.steps > step).view(-1, 1, 1, 1), moved, x_adv)
    return x_adv


def measure_strategies(fabric: Fabric, repeats: int, network: Network) -> Case:
    """Images that leave the batch against images that are masked, with the same strategies."""
    name, shape, eps, _, batch = network
    model, x, y = task(name, shape, batch, fabric.device)
    game, space, rng = LasAt(Linf(eps)), StrategySpace(eps), stream(SEED, "start", fabric.device)
    chosen = space.decode(RandomStrategy(space.sizes, rng).act(x, learn=False))
    plays: dict[str, Play] = {
        "advgame": lambda: game.attack(chosen).run(model, x, y, rng=rng, check=False),
        "masked loop": lambda: masked_loop(model, x, y, chosen, rng),
    }
    rows = compare(plays, repeats, WARM_UP, fabric.autocast)
    facts: Case = {"network": name, "shape": shape, "batch": batch, "eps": eps}
    facts |= {"mean_steps": chosen.steps.sum().item() / batch, "max_steps": int(chosen.steps.max())}
    return facts | {"speed_up": rows["masked loop"]["times_ours"], "contestants": rows}
