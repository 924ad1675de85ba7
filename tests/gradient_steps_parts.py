"""An attack by gradient steps under way, and a step that all its images make."""

import torch

from advgame.attacks.gradient_steps import GradientStepsState, Menu
from advgame.seeding import stream


def begun(model, ball, x, y, menu=None, queries=10, **settings):
    budget = torch.full((len(x),), queries)
    settings = {"rng": stream(0, "attack"), **settings}
    return GradientStepsState(model, ball, menu or Menu(), x, y, budget, **settings)


def all_step(state, size, loss="margin", move="on", momentum=0, direction="steepest"):
    action = state.menu.index(size, momentum, loss, direction, move)
    state.step(torch.tensor(action).expand(len(state.y), -1))
