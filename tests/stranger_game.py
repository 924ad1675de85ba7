"""A learned game outside the package: one perturbation for all images (Shafahi et al. 2020).
`python tests/stranger_game.py --attacker-lr 0.05` trains and judges, `--resume` goes on."""

import sys
from dataclasses import dataclass

import torch

from advgame.games import DefenderStep, Rules
from advgame.run import DefenderJob, MethodsStudy, RunConfig, ball


class Universal(Rules):  # the classifier descends a loss that δ = ε·tanh(u) ascends
    def __init__(self, threat, shape, lr, device):
        self.threat, self.u = threat, torch.zeros(shape, device=device, requires_grad=True)
        self.adam = torch.optim.Adam([self.u], lr=lr, maximize=True)

    def step(self, defender, x, y, rng, *, scale=1.0):
        self.adam.zero_grad()
        x_adv = (x + scale * self.threat.eps * self.u.tanh()).clamp(0, 1)
        losses = defender.descend(lambda model: defender.loss(model(x_adv), y))
        defender.step()
        self.adam.step()
        return DefenderStep(x_adv.detach(), losses, {"game/adversarial_loss": losses.mean()})

    def state_dict(self):
        return {"u": self.u.detach(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        self.u.data.copy_(state["u"])
        self.adam.load_state_dict(state["adam"])


@dataclass(frozen=True)
class Config(RunConfig):
    """Train a classifier against one perturbation that is learned for all images."""

    attacker_lr: float = 0.05
    """learning rate of the perturbation"""


class Universals(DefenderJob):
    config = Config

    def rules(self, config, data, fabric):
        return Universal(ball(config), data.shape, config.attacker_lr, fabric.device)

    def title(self, config):
        return "universal adversarial training"


class Rates(MethodsStudy):
    about, script = "Universal perturbations", sys.modules[__name__]
    methods = {"still": "--attacker-lr 1e-9", "learning": "--attacker-lr 0.05"}  # noqa: RUF012


job = Universals()
if __name__ == "__main__":
    job.main()
