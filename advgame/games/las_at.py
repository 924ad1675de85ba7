"""One step of LAS-AT: the defender meets an attack whose strategy somebody else chose.

Source: Jia et al., LAS-AT (CVPR 2022) and its published code. The attacker is paid, per image,
    R = a·R1 + b·R2 + c·R3
R1: loss of the defender on the adversarial examples; R2, R3: robust and clean correctness of the
defender after a one-step look-ahead on them. R1 is zero-sum against the defender's training
loss, R2 and R3 reward what helps the defender: as published, LAS-AT is a general-sum game.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, BatchNormMode, GradientAttack, LabelFree, pgd
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.pairing import Trades
from advgame.games.strategy import Strategies
from advgame.losses import Loss, cross_entropy
from advgame.threat import GaussianStart, Threat

Credit = Literal["mixed", "sample", "batch"]


@dataclass(frozen=True)
class Payoffs:
    """The attacker's pay-off terms, already weighted; their sum is its reward.

    Args:
        r1: (B,) a·min(loss on the adversarial example, 10).
        r2: (B,) b·r2_weight·(robustly correct after the look-ahead).
        r3: (B,) c·r3_weight·(clean correct after the look-ahead).
    """

    r1: Tensor
    r2: Tensor
    r3: Tensor

    def reward(self, credit: Credit) -> Tensor:
        """The reward of each image's strategy, (B,).

        - ``"mixed"``: own R1, the batch's mean R2 and R3: unbiased for what one image's player
          earns when the other images count as its environment. Against the sum of all pay-offs
          its R2 and R3 weigh 1/B, since every image moves all B of them.
        - ``"sample"``: own R1, R2 and R3: lower variance, and biased, since the look-ahead's
          effect on other images is left out.
        - ``"batch"``: one scalar for all, as the published code: unbiased for the sum of all
          pay-offs, up to the factor 1/B, with the noise of B images on each.
        """
        if credit == "sample":
            return self.r1 + self.r2 + self.r3
        shared = (self.r2 + self.r3).mean()
        if credit == "mixed":
            return self.r1 + shared
        return (self.r1.mean() + shared).expand_as(self.r1).clone()


@dataclass(frozen=True)
class StepResult:
    """What one step of the game did.

    Args:
        x_adv: (B, C, H, W) adversarial examples the defender trained on.
        losses: (B,) the defender's training losses.
        payoffs: the attacker's terms, or None where they were not asked for.
        stats: scalar tensors to log; ``attacker/forwards_per_image`` is what the step is worth in
            forwards of the defender (F = 1, input-backward 1, backward with weights 2).
    """

    x_adv: Tensor
    losses: Tensor
    payoffs: Payoffs | None
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class LasAt:
    """The rules of the game.

    Args:
        threat: the ball of radius ε₀ in which the defender is judged.
        a: weight of R1.
        b: weight of R2.
        c: weight of R3.
        r2_weight: scale of the robust correctness in R2.
        r3_weight: scale of the clean correctness in R3.
        start: ``"own"`` draws the attack's start from each image's own ball, ``"eps0"`` from the
            ball of ε₀ whatever ε was chosen, as the published code does.
        look_ahead_mode: batch-norm mode of the look-ahead attack; the published code's is train.
        loss: what the attack ascends and R1 pays.
        cap: R1 is at most this, and R2, R3 between its ends; published: 10, LAS-TRADES 20.
        clamp: pull what the defender learns from back into the ball of ε₀, so that a larger ε
            changes the attack's path only (LAS-AWP); R1 is paid before that.

    A defender under adversarial weight perturbation (`advgame.games.awp.AWPDefender`) makes it
    LAS-AWP: its own step and the look-ahead's are then along the gradient at the worst weights.
    The look-ahead is always the defender's own step, whose gradient is there already. In the
    published LAS-AWP it is another one, so that R2 and R3 are paid for other weights than ours:
    its copy learns from the examples before they are clamped, by a smoothed loss, where the
    defender's own loss is not smoothed. That would take a second gradient of the defender per
    paid step.
    """

    threat: Threat
    a: float = 1.0
    b: float = 1.0
    c: float = 1.0
    r2_weight: float = 4.0
    r3_weight: float = 2.0
    start: Literal["own", "eps0"] = "own"
    look_ahead_mode: BatchNormMode = "eval"
    loss: Loss = cross_entropy
    cap: float = 10.0
    clamp: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.threat.eps, Tensor):
            raise InputError("the game is judged at one eps: give the threat a float")

    @property
    def batches(self) -> int:
        """Batches of images that the objective passes through the classifier."""
        return 1

    def objective(
        self,
        model: nn.Module,
        x: Tensor,
        x_adv: Tensor,
        y: Tensor,
        strategies: Strategies,
        fit: Loss,
    ) -> Tensor:
        """What the defender descends, and R1 pays, per image (B,).

        Args:
            model: the classifier.
            x: clean images (B, C, H, W).
            x_adv: adversarial examples, the same shape.
            y: (B,).
            strategies: of the attack.
            fit: of (logits, labels).
        """
        return fit(model(x_adv), y)

    def attack(self, strategies: Strategies) -> Attack:
        """PGD with each image's own strategy."""
        ball = self.threat.with_radii(strategies.eps)
        return GradientAttack(
            ball,
            strategies.steps,
            strategies.step_size,
            start=self.threat if self.start == "eps0" else ball,
            loss=self.loss,
        )

    def look_ahead_attack(self) -> GradientAttack:
        """PGD-10 at ε₀ with 2 restarts.

        An image leaves as soon as it is misclassified, except in training mode, where the batch
        statistics need the whole batch.
        """
        return replace(
            pgd(self.threat, steps=10, restarts=2),
            loss=self.loss,
            stop_when_fooled=self.look_ahead_mode == "eval",
            mode=self.look_ahead_mode,
        )

    def step(
        self,
        defender: Defender,
        x: Tensor,
        y: Tensor,
        strategies: Strategies,
        rng: torch.Generator,
        *,
        pay: bool = True,
    ) -> StepResult:
        """Attack with the strategies, pay the attacker, teach the defender.

        Args:
            defender: learns from the adversarial examples; everything else leaves it untouched.
            x: clean images (B, C, H, W) in [0, 1].
            y: labels (B,).
            strategies: one PGD configuration per image.
            rng: stream of the random starts, on the images' device; the look-ahead's are drawn
                from it, too, so that games which pay and which do not draw other starts.
            pay: compute the attacker's pay-offs, the costly part.
        """
        with defender.fabric.autocast():
            attacked = self.attack(strategies).run(defender.module, x, y, rng=rng, check=False)
        cost = (attacked.forwards + attacked.backwards) / len(x)
        x_adv = attacked.x_adv
        r1 = self._loss_now(defender, x, x_adv, y, strategies) if pay else None
        x_adv = self.threat.project(x_adv, x) if self.clamp else x_adv
        losses = defender.descend(
            lambda model: self.objective(model, x, x_adv, y, strategies, defender.loss)
        )
        cost += 3 * self.batches * defender.descents
        payoffs = None
        if r1 is not None:
            with defender.fabric.autocast():
                payoffs, spent = self._pay(defender.look_ahead(), r1, x, y, rng)
            cost += spent + self.batches
        defender.step()
        stats = self._stats(losses, payoffs, strategies)
        stats["attacker/forwards_per_image"] = torch.tensor(cost, device=x.device)
        return StepResult(x_adv, losses, payoffs, stats)

    def _loss_now(
        self, defender: Defender, x: Tensor, x_adv: Tensor, y: Tensor, strategies: Strategies
    ) -> Tensor:
        """The objective before the defender learns, in evaluation mode, (B,)."""
        defender.module.eval()
        with torch.no_grad(), defender.fabric.autocast():
            return self.objective(defender.module, x, x_adv, y, strategies, self.loss)

    def _pay(
        self, ahead: nn.Module, r1: Tensor, x: Tensor, y: Tensor, rng: torch.Generator
    ) -> tuple[Payoffs, float]:
        attacked = self.look_ahead_attack().run(ahead, x, y, rng=rng, check=False)
        spent = (attacked.forwards + attacked.backwards) / len(x) + 1
        with torch.no_grad():
            clean = ahead(x).argmax(1) == y
            if attacked.fooled is None:
                robust = ahead(attacked.x_adv).argmax(1) == y
                spent += 1
            else:
                robust = ~attacked.fooled
        payoffs = Payoffs(
            self.a * r1.clamp(0, self.cap),
            self.b * (self.r2_weight * robust.float()).clamp(-self.cap, self.cap),
            self.c * (self.r3_weight * clean.float()).clamp(-self.cap, self.cap),
        )
        return payoffs, spent

    def _stats(
        self, losses: Tensor, payoffs: Payoffs | None, strategies: Strategies
    ) -> dict[str, Tensor]:
        stats = {
            "game/adversarial_loss": losses.mean(),
            "strategy/eps": strategies.eps.mean(),
            "strategy/steps": strategies.steps.float().mean(),
            "strategy/step_size": strategies.step_size.mean(),
        }
        if strategies.beta is not None:
            stats["strategy/beta"] = strategies.beta.mean()
        if payoffs is not None:
            stats |= {
                "game/r1_loss": payoffs.r1.mean(),
                "game/r2_robust": payoffs.r2.mean(),
                "game/r3_clean": payoffs.r3.mean(),
                "game/attacker_reward": payoffs.reward("batch").mean(),
            }
        return stats


@dataclass(frozen=True)
class LasTrades(LasAt):
    """LAS-TRADES: the policy also weighs, image by image, TRADES' divergence from clean outputs.

    The attack ascends that divergence, from 0.001 N(0, 1) beside the image, with the clean logits
    formed once. R1 is the whole objective, β and all: a policy can raise it by a larger β alone.
    The published code forms it in training mode, which moves batch norm's statistics; ours does
    not.
    """

    cap: float = 20.0

    @property
    def batches(self) -> int:
        """Clean images and adversarial examples."""
        return 2

    def attack(self, strategies: Strategies) -> Attack:
        """KL-PGD with each image's own strategy."""
        ball = self.threat.with_radii(strategies.eps)
        steps, size = strategies.steps, strategies.step_size
        return LabelFree(GradientAttack(ball, steps, size, start=GaussianStart()))

    def objective(
        self,
        model: nn.Module,
        x: Tensor,
        x_adv: Tensor,
        y: Tensor,
        strategies: Strategies,
        fit: Loss,
    ) -> Tensor:
        """CE(f(x), y) + β KL(f(x) ‖ f(x'))."""
        if strategies.beta is None:
            raise InputError("LAS-TRADES' strategies have a beta: give the space its choices")
        own, pairing = Trades(self.threat).terms(model(x), model(x_adv), y, fit)
        return own + strategies.beta * pairing
