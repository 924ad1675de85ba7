"""What the tests of L2L share: its networks and players, small."""

from advgame.seeding import seeded_init
from agents.l2l import L2LNetwork, L2LPlayer

DIGIT, EPS = (1, 8, 8), 0.1


def network(gradients=1, shape=DIGIT, seed=0, **settings):
    with seeded_init(seed):
        return L2LNetwork(shape, gradients, **settings)


def player(gradients=1, keep=None, **settings):
    """A player; ``keep`` collects φ's gradients at each of its steps."""

    def note(module):
        if keep is not None:
            keep.append([p.grad.clone() for p in module.parameters()])

    return L2LPlayer(network(gradients), synchronise=note, **settings)
