"""A mixture of classifiers: for each query one of its members is drawn, and answers.

An attacker that knows the members and their weights, but not which one is drawn, faces on each
image the expectation over members. Meunier et al. 2021 call it a mixed classifier, Pinot et al.
2020 a randomised one, Dbouk & Shanbhag 2022 a randomised ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from advgame.arena.mixture_file import check_weights
from advgame.errors import InputError
from advgame.evaluation.verdicts import predict
from advgame.losses import Loss, full_precision

Answers: TypeAlias = Tensor
"""Logits of all members, (B, M, K)."""


class ClassifierMixture(nn.Module):
    """Members and the probabilities that they are drawn with.

    Called as a classifier it draws nothing: its logits are the logarithms of the expected
    probabilities, as of an ensemble that votes. How robust the mixture is they do not say:
    `right` does, member by member.

    Args:
        members: classifiers of the same images and classes.
        weights: their probabilities, in the same order.

    Raises:
        InputError: no member, or weights that are no probabilities.
    """

    weights: Tensor

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        check_weights(weights, len(members))
        self.members = nn.ModuleList(members)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))

    def answers(self, x: Tensor) -> Answers:
        """The logits of all members, (B, M, K), in fp32 or above.

        Raises:
            InputError: members of different classes.
        """
        found = [full_precision(member(x)) for member in self.members]
        if len({one.shape for one in found}) > 1:
            sizes = ", ".join(str(one.shape[1]) for one in found)
            raise InputError(f"the members of a mixture must have the same classes, not {sizes}")
        return torch.stack(found, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> log Σ_d p_d softmax(logits of d), (B, K)."""
        shares = self.weights.to(x.device).log()[None, :, None]
        found = self.answers(x).log_softmax(2)
        return (found + shares.to(found)).logsumexp(1)

    def classes(self, x: Tensor) -> Tensor:
        """What each member takes each image for, (B, M), without a graph; -1 for no class."""
        return torch.stack([predict(member, x, len(x)) for member in self.members], 1)

    def right(self, x: Tensor, y: Tensor) -> Tensor:
        """Which members classify which images correctly, bool (B, M)."""
        return self.classes(x) == y[:, None]

    def expected(self, right: Tensor) -> Tensor:
        """With what probability each image is classified correctly, fp64 (B,), from `right`."""
        return right.to(self.weights) @ self.weights

    def expected_loss(self, answers: Answers, y: Tensor, loss: Loss) -> Tensor:
        """Σ_d p_d loss(logits of d, y), (B,)."""
        each = torch.stack([loss(one, y) for one in answers.unbind(1)], 1)
        # no product of matrices, which autocast would round to bf16
        return (each * self.weights.to(each)).sum(1)
