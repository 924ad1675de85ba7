"""LAS-AT: one training step of a defender against PGD whose strategy is chosen image by image.

Source: Jia et al., LAS-AT (CVPR 2022) and its published code. `LasAt.step` is the whole step of
the target network f_θ (here the defender), in the order of the paper's algorithm 1. Somebody else
chose the strategies a = (ε, T, α), per image, and is paid for them by `LasAt.pay`, again per image:
    R = a·R1 + b·R2 + c·R3
R1: loss of f_θ on the adversarial examples; R2, R3: whether f_θ̂ is right on the attacked and on
the clean image, where θ̂ is θ after a one-step look-ahead. A reward of your own takes its place as
``LasAt(threat, reward=...)``, a function of `Outcome`. R1 is zero-sum against the defender's
training loss, R2 and R3 reward what helps the defender: as published, a general-sum game.

With ``LasAt(threat, progress=...)`` all images of a batch are paid the fall of a held-out loss
instead (`advgame.games.progress`), which needs no look-ahead.

`envs.strategy_selection` plays it with actions and rewards; a policy learns by `agents.reinforce`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from advgame.attacks import Attack, GradientAttack, LabelFree, attacked, pgd
from advgame.attacks.stopping import StoppingRule
from advgame.choices import BatchNormMode, Credit
from advgame.defender import Defender
from advgame.errors import InputError
from advgame.games.costs import DefenderStep, Passes
from advgame.games.pairing import Trades
from advgame.games.progress import LearningProgress
from advgame.games.stopping import DealtSteps
from advgame.games.strategy import Strategies
from advgame.losses import Loss, cross_entropy
from advgame.threat import GaussianStart, Threat


@dataclass(frozen=True)
class Payoffs:
    """What the attacker earns in a step, each (B,); where progress is paid, the terms are 0.

    Args:
        r1: a·R1.
        r2: b·R2.
        r3: c·R3.
        reward: R, of each image's strategy.
    """

    r1: Tensor
    r2: Tensor
    r3: Tensor
    reward: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a paid step of LAS-AT measured: what a reward of your own is made of.

    Nothing here has a gradient, and the networks are in evaluation mode. What a reward asks of them
    is not counted in the cost of the step.

    Args:
        x: clean images (B, C, H, W) in [0, 1].
        x_adv: adversarial examples of the strategies, the same shape, before any clamp.
        y: labels (B,).
        strategies: that were played; after the ramp of ε where there is one.
        loss: (B,) of f_θ on the adversarial examples: the whole objective in LAS-TRADES.
        robust: (B,) 1 where f_θ̂ is right under PGD-10, 0 elsewhere.
        clean: (B,) 1 where f_θ̂ is right on the clean image, 0 elsewhere.
        payoffs: the published terms R1, R2, R3 and their reward, under the credit asked for.
        model: f_θ, the defender before it learns from ``x_adv``.
        ahead: f_θ̂, after the one-step look-ahead; the next step overwrites it.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    strategies: Strategies
    loss: Tensor
    robust: Tensor
    clean: Tensor
    payoffs: Payoffs
    model: nn.Module
    ahead: nn.Module


Reward = Callable[[Outcome], Tensor]
"""What each image's strategy earns, (B,)."""


@dataclass(frozen=True)
class StepResult(DefenderStep):
    """What one step did.

    Args:
        payoffs: the attacker's, or None where it was not paid.
        strategies: that were played, with the steps that were made.
    """

    payoffs: Payoffs | None = None
    strategies: Strategies | None = None


@dataclass(frozen=True)
class LasAt:
    """The rules of the game.

    Args:
        threat: the ball of radius ε₀ in which the defender is judged.
        a: weight of R1.
        b: weight of R2.
        c: weight of R3.
        r2_weight: scale of the robust correctness in R2, before the cap; b is its weight after it.
        r3_weight: scale of the clean correctness in R3, before the cap; c is its weight after it.
        start: ``"own"`` draws the attack's start from each image's own ball, ``"eps0"`` from the
            ball of ε₀ whatever ε was chosen, as the published code does.
        look_ahead_mode: batch-norm mode of the look-ahead attack; the published code's is train.
        loss: what the attack ascends and R1 pays.
        cap: R1 lies in [0, cap], R2 and R3 in [-cap, cap]; published: 10, LAS-TRADES 20.
        reward: a reward of your own, a function of `Outcome` that returns (B,); None is R. The
            terms R1, R2, R3 are then logged as they are without it.
        rule: ends the attack on each image, after the strategy's steps at the latest
            (`advgame.games.stopping`); the strategies told of have the steps that were made.
        deal: deal the numbers of steps that the rule finds to other images.
        progress: paid instead of R, to all images of a batch: what the steps since it was last paid
            have brought. It has a state, which the environment saves.
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

    batches: ClassVar[int] = 1  # that the objective passes through the classifier

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
    reward: Reward | None = None
    rule: StoppingRule | None = None
    deal: bool = False
    progress: LearningProgress | None = None

    def __post_init__(self) -> None:
        if self.progress is not None and self.reward is not None:
            raise InputError("a reward of your own and progress cannot both be paid: give one")
        if isinstance(self.threat.eps, Tensor):
            raise InputError("the game is judged at one eps: give the threat a float")
        if self.deal and self.rule is None:
            raise InputError("steps are dealt as a rule finds them: give the game its rule")

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
        made = GradientAttack(
            ball,
            strategies.steps,
            strategies.step_size,
            start=self.threat if self.start == "eps0" else ball,
            loss=self.loss,
            rule=self.rule,
        )
        return DealtSteps(made) if self.deal else made

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
        credit: Credit | None = "mixed",
    ) -> StepResult:
        """Attack with the strategies, pay for them, teach the defender.

        Args:
            defender: θ and its optimiser; learns from the adversarial examples.
            x: clean images (B, C, H, W) in [0, 1].
            y: labels (B,).
            strategies: a = (ε, T, α), one PGD configuration per image.
            rng: stream of the random starts, on the images' device; the look-ahead's are drawn
                from it, too, so that games which pay and which do not draw other starts.
            credit: how the reward is shared out; None pays nothing, which spares the costly part.

        Returns:
            ``stats`` holds the step's `Passes`, too.
        """
        progress, passes = self.progress, Passes()
        looks_ahead = credit is not None and progress is None
        if progress is not None:
            progress.begin(defender, len(x), passes)
        # x' = x + δ: PGD with each image's own ε, T, α
        with defender.under_attack():
            made = self.attack(strategies).run(defender.module, x, y, rng=rng, check=False)
        x_adv = made.x_adv
        passes.add_attack(made)
        if made.steps is not None:
            strategies = replace(strategies, steps=made.steps)

        # R1: the loss L(f_θ(x'), y), before θ learns from x'
        if looks_ahead:
            defender.module.eval()
            with torch.no_grad(), defender.fabric.autocast():
                loss = self.objective(defender.module, x, x_adv, y, strategies, self.loss)
            passes.forwards += self.batches

        # g = ∇_θ of the training loss on x'
        x_adv = self.threat.project(x_adv, x) if self.clamp else x_adv
        losses = defender.descend(
            lambda model: self.objective(model, x, x_adv, y, strategies, defender.loss)
        )
        passes.add_descent(defender, self.batches)

        # R2, R3: is f_θ̂ right under PGD-10, and on the clean image, where θ̂ = θ - λ g
        payoffs = None
        if looks_ahead and credit is not None:
            f_ahead = defender.look_ahead()
            with defender.under_attack():
                robust = self.robust(f_ahead, x, y, rng, passes)
                with torch.no_grad():
                    clean = (f_ahead(x).argmax(1) == y).float()
            passes.forwards += 1
            payoffs = self.pay(loss, robust, clean, credit)
            if self.reward is not None:
                told = (loss, robust, clean, payoffs)
                seen = Outcome(x, made.x_adv, y, strategies, *told, defender.module, f_ahead)
                payoffs = replace(payoffs, reward=self._own_reward(seen))

        # θ ← θ - λ g, by the defender's own optimiser, with its momentum
        defender.step()
        if progress is not None:
            progress.spend(passes)
            if credit is not None:
                zero = torch.zeros_like(losses)
                paid = progress.pay(defender, len(x), passes)
                payoffs = Payoffs(zero, zero, zero, zero + paid)
        stats = self._stats(losses, payoffs, strategies) | passes.stats(x.device)
        return StepResult(x_adv, losses, stats, payoffs, strategies)

    def robust(
        self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, passes: Passes
    ) -> Tensor:
        """1 where a classifier, one step ahead, is right under PGD-10, 0 elsewhere, (B,).

        Args:
            model: the classifier.
            x: clean images (B, C, H, W).
            y: labels (B,).
            rng: stream of the random starts.
            passes: what it costs is added.
        """
        held = self.look_ahead_attack().run(model, x, y, rng=rng, check=False)
        passes.add_attack(held)
        if held.fooled is not None:
            return (~held.fooled).float()
        passes.forwards += 1
        with torch.no_grad():
            right: Tensor = model(held.x_adv).argmax(1) == y
        return right.float()

    def pay(self, loss: Tensor, robust: Tensor, clean: Tensor, credit: Credit) -> Payoffs:
        """The reward R = a·R1 + b·R2 + c·R3 of each image's strategy, as published.

        Args:
            loss: (B,) of f_θ on the adversarial examples.
            robust: (B,) 1 where f_θ̂ is right on the attacked image, 0 elsewhere.
            clean: (B,) the same on the clean image.
            credit: who is paid for what.
                ``"mixed"``: own R1, the batch's mean R2 and R3: unbiased for what one image's
                player earns when the other images count as its environment. Against the sum of
                all pay-offs its R2 and R3 weigh 1/B, since every image moves all B of them.
                ``"sample"``: own R1, R2 and R3: lower variance, and biased, since the look-ahead's
                effect on other images is left out.
                ``"batch"``: as the published code, each term is the batch's mean, clamped as a
                whole, and all images get the same: unbiased for the sum of all pay-offs, up to
                the factor 1/B, with the noise of B images on each.
        """
        r1, r2, r3 = loss, self.r2_weight * robust, self.r3_weight * clean
        if credit == "batch":
            r1, r2, r3 = (r.mean().expand_as(r).clone() for r in (r1, r2, r3))
        r1 = self.a * r1.clamp(0, self.cap)
        r2 = self.b * r2.clamp(-self.cap, self.cap)
        r3 = self.c * r3.clamp(-self.cap, self.cap)
        reward = r1 + (r2 + r3).mean() if credit == "mixed" else r1 + r2 + r3
        return Payoffs(r1, r2, r3, reward)

    def try_reward(self, model: nn.Module, x: Tensor, y: Tensor, strategies: Strategies) -> None:
        """Refuse a reward of your own that fails, before any work; θ̂ is θ here, x' is x.

        Args:
            model: the classifier; left as it was.
            x: a few images (B, C, H, W).
            y: (B,).
            strategies: of as many images.

        Raises:
            InputError: what it returned.
        """
        if self.reward is None:
            return
        with attacked(model), torch.no_grad():
            loss = self.objective(model, x, x, y, strategies, self.loss)
            right = (model(x).argmax(1) == y).float()
        told = (loss, right, right, self.pay(loss, right, right, "sample"))
        self._own_reward(Outcome(x, x, y, strategies, *told, model, model))

    def _own_reward(self, seen: Outcome) -> Tensor:
        """The reward of your own, looked at."""
        assert self.reward is not None
        with attacked(seen.model), torch.no_grad():
            reward: object = self.reward(seen)
        want, words = tuple(seen.y.shape), f"a {type(reward).__name__}"
        if isinstance(reward, Tensor):
            words = f"{reward.dtype} of shape {tuple(reward.shape)}"
            if tuple(reward.shape) == want and reward.is_floating_point():
                if bool(torch.isfinite(reward).all()):
                    return reward.detach().to(seen.loss)
                words = "NaN or infinity"
        raise InputError(f"a reward returns finite floats {want}, one per image, not {words}")

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
        if self.rule is not None:
            stats |= self.rule.stats()
        if payoffs is not None:
            stats["game/attacker_reward"] = payoffs.reward.mean()
            if self.progress is not None:
                stats["game/held_out_loss"] = torch.full_like(losses[0], self.progress.level)
                return stats
            stats |= {
                "game/r1_loss": payoffs.r1.mean(),
                "game/r2_robust": payoffs.r2.mean(),
                "game/r3_clean": payoffs.r3.mean(),
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

    batches: ClassVar[int] = 2  # clean images and adversarial examples

    cap: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is not None:
            raise InputError("a rule needs labels, which LAS-TRADES' attack has not: take LasAt")

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
