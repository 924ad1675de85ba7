"""What the tests of ADT share: its attacks, networks and players, small."""

from advgame.attacks import DistributionalAttack
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.adt import ADTAttack, ADTNetwork
from agents.adt_networks import Encoder
from agents.adt_players import ExplicitPlayer, ImplicitPlayer

DIGIT, EPS = (1, 8, 8), 0.1
KINDS = ("exp-am", "imp-am")


def known(name, **settings):
    """An attack of each method, generators as they were born."""
    if name == "exp":
        return DistributionalAttack(Linf(EPS), steps=2, samples=2, **settings)
    return ADTAttack(network(name), Linf(EPS), **settings)


def network(kind="exp-am", shape=DIGIT, seed=0, **settings):
    with seeded_init(seed):
        return ADTNetwork(shape, kind, **{"latent": 4, **settings})


def player(kind, keep=None, **settings):
    """A player; ``keep`` collects the gradients at each of its steps."""

    def note(module):
        if keep is not None:
            keep.append([p.grad.clone() for p in module.parameters()])

    if kind == "exp-am":
        return ExplicitPlayer(network(kind), synchronise=note, **settings)
    with seeded_init(1):
        encoder = Encoder(DIGIT, 4)
    return ImplicitPlayer(network(kind), encoder, synchronise=note, **settings)
