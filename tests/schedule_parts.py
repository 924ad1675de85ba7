"""An ascent, and a move that all its images make."""

import torch

from advgame.attacks.gradient_steps import GradientStepsState, Menu
from advgame.seeding import stream


def ascent(model, ball, x, y, menu=None, queries=10, **settings):
    budget = torch.full((len(x),), queries)
    settings = {"rng": stream(0, "attack"), **settings}
    return GradientStepsState(model, ball, menu or Menu(), x, y, budget, **settings)


def the_same_for_all(menu, count, *move):
    return torch.tensor(menu.index(*move)).expand(count, -1)
