"""What the tests of attacker networks share: small networks, their players, attacks and games."""

from advgame.attacks.distributional import DistributionalAttack
from advgame.games.adt import AdtAmortised
from advgame.games.l2l import L2L
from advgame.games.minimax import Minimax
from advgame.seeding import seeded_init
from advgame.threat import Linf
from agents.adt import ADTNetwork, ExplicitPlayer, ImplicitPlayer
from agents.adt_networks import Encoder
from agents.attacker_network import AttackerPlayer, NetworkAttack
from agents.attnet import AttNet
from agents.l2l import L2LNetwork

DIGIT, EPS = (1, 8, 8), 0.1
BALL = Linf(EPS)
L2LS = (0, 1, 2)  # by input gradients: Naive, Grad, 2-Step
ADTS = ("exp-am", "imp-am")
NETWORKS = (*L2LS, *ADTS, "attnet")


def network(kind=1, shape=DIGIT, seed=0, **settings):
    """A network of a kind of `NETWORKS`, as it was born."""
    with seeded_init(seed):
        if kind == "attnet":
            return AttNet(shape, 10, **{"hidden": 16, **settings})
        if kind in ADTS:
            return ADTNetwork(shape, kind, **{"latent": 4, **settings})
        return L2LNetwork(shape, kind, **settings)


def player(kind=1, keep=None, seed=0, **settings):
    """A player; ``keep`` collects φ's gradients at each of its steps."""

    def note(module):
        if keep is not None:
            keep.append([p.grad.clone() for p in module.parameters()])

    made = network(kind, seed=seed)
    if kind == "exp-am":
        return ExplicitPlayer(made, synchronise=note, **settings)
    if kind == "imp-am":
        with seeded_init(1):
            encoder = Encoder(DIGIT, 4)
        return ImplicitPlayer(made, encoder, synchronise=note, **settings)
    return AttackerPlayer(made, synchronise=note, **settings)


def game(kind, own=None, **rules):
    """The game that a kind of network plays, by default with a `player` of its own."""
    rules_of = L2L if kind in L2LS else Minimax if kind == "attnet" else AdtAmortised
    return rules_of(BALL, own or player(kind), **rules)


def joint(kind, own=None):
    """The same game, in which one backward pass serves both players."""
    return game(kind, own, **({"form": "shared"} if kind in L2LS else {}))


def known(kind, **settings):
    """An attack of each kind of network, and of "exp", which needs none."""
    if kind == "exp":
        return DistributionalAttack(BALL, steps=2, samples=2, **settings)
    return NetworkAttack(network(kind), BALL, **settings)
