"""The strategy policy (an image in, a distribution per choice out) and its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from advgame.classifiers import SmallCNN, make_classifier
from advgame.errors import InputError
from advgame.health import entropy_sign


class StrategyPolicy(nn.Module):
    """π(a | x): a trunk, one linear head per choice, and a value head for a baseline.

    The input is the clean image alone, as published.

    Args:
        shape: (C, H, W) of the images.
        sizes: number of options of each choice.
        network: the trunk, a name of `CLASSIFIERS`; None is LAS-AT's ResNet-18 for images of 16
            pixels or more with three channels, a narrow small CNN for digits and MNIST.
        uniform: start with heads of zero, that is with the uniform policy; else with torch's
            default initialisation, as the published code.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        sizes: tuple[int, ...],
        *,
        network: str | None = None,
        uniform: bool = True,
    ) -> None:
        super().__init__()
        large = shape[0] == 3 and min(shape[1:]) >= 16
        trunk: Any = (
            make_classifier(network or "resnet18", shape, 1)
            if network or large
            else SmallCNN(shape, 1, width=16)
        )
        width: int = trunk.width
        trunk.head = nn.Identity()
        self.trunk, self.width = trunk, width
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        if uniform:
            for parameter in self.heads.parameters():
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> logits of each choice, (B, n)."""
        features = self.trunk(images)
        return [head(features) for head in self.heads]


class ValueNet(nn.Module):
    """V(x), the reward to expect of an image: a small CNN of its own.

    It shares nothing with the policy: rewards are large and mostly not of the policy's making,
    and a policy's features, moved by noisy gradients, serve it badly.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.net = SmallCNN(shape, 1, width=16, hidden=64)
        nn.init.zeros_(self.net.head.weight)
        nn.init.zeros_(self.net.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> values (B,)."""
        values: Tensor = self.net(images)[:, 0]
        return values


def sample(logits: list[Tensor], rng: torch.Generator) -> Tensor:
    """One independent draw per image and choice: logits [(B, n), …] -> indices (B, choices).

    Raises:
        InputError: logits that are not finite, of a policy that has diverged.
    """
    try:
        draws = [torch.multinomial(one.softmax(1), 1, generator=rng) for one in logits]
    except RuntimeError as error:
        if all(bool(one.isfinite().all()) for one in logits):
            raise
        raise InputError(DIVERGED) from error
    return torch.cat(draws, 1)


DIVERGED = "the policy has diverged, its logits are not finite: lower its learning rate"


def log_probability(logits: list[Tensor], actions: Tensor) -> Tensor:
    """Log π(a | x) of all choices together, (B,)."""
    terms = [_choice(one).log_prob(actions[:, i]) for i, one in enumerate(logits)]
    return torch.stack(terms).sum(0)


def entropies(logits: list[Tensor]) -> Tensor:
    """Mean entropy of each choice over the batch, in nats, (choices,)."""
    return torch.stack([_choice(one).entropy().mean() for one in logits])


def _choice(logits: Tensor) -> Categorical:
    """The distribution of one choice. `sample` refuses what torch would look for, by waiting."""
    return Categorical(logits=logits, validate_args=False)


def entropy_stats(
    names: Sequence[str], logits: list[Tensor], entropy: Tensor, player: str = "strategy"
) -> dict[str, Tensor]:
    """Scalars to log of a policy's entropy.

    Args:
        names: of the choices.
        logits: of each choice, (B, options).
        entropy: what `entropies` makes of them.
        player: whose sign of life the share of the largest entropy is.
    """
    named = zip(names, entropy.detach(), strict=False)
    found = {f"strategy/entropy_{name}": one for name, one in named}
    return found | entropy_sign(entropy, [one.shape[1] for one in logits], player)


class FeaturePolicy(nn.Module):
    """π(a | features): two hidden layers, and logits of each choice; uniform when new.

    Args:
        inputs: length of the feature vector.
        sizes: number of options of each choice.
        hidden: units of each hidden layer.
    """

    def __init__(self, inputs: int, sizes: tuple[int, ...], hidden: int = 64) -> None:
        super().__init__()
        self.sizes, self.hidden = tuple(sizes), hidden
        self.trunk = _trunk(inputs, hidden)
        self.heads = nn.Linear(hidden, sum(sizes))
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Features (B, n) -> logits of each choice, (B, options)."""
        return list(self.heads(self.trunk(features)).split(self.sizes, dim=1))


class FeatureValue(nn.Module):
    """V(features), the return to expect; 0 when new.

    Args:
        inputs: length of the feature vector.
        hidden: units of each hidden layer.
    """

    def __init__(self, inputs: int, hidden: int = 64) -> None:
        super().__init__()
        self.trunk, self.head = _trunk(inputs, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, n) -> values (B,)."""
        values: Tensor = self.head(self.trunk(features))[:, 0]
        return values


def _trunk(inputs: int, hidden: int) -> nn.Sequential:
    """The layers of Stable-Baselines3's MlpPolicy, so that its weights fit."""
    layers = (nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
    return nn.Sequential(*layers)
