"""An ascent, and a move that all its images make."""

import torch

from advgame.attacks.menu import Menu
from advgame.attacks.schedule import Ascent
from advgame.seeding import stream


def ascent(model, ball, x, y, menu=None, queries=10, **settings):
    budget = torch.full((len(x),), queries)
    settings = {"rng": stream(0, "attack"), **settings}
    return Ascent(model, ball, menu or Menu(), x, y, budget, **settings)


def the_same_for_all(menu, count, *move):
    return menu.decode(torch.tensor(menu.index(*move)).expand(count, -1))
