"""Games: what one step of each attacker-defender game does.

Most are rules of `DefenderTraining`; `CatAndMouse` and `ImitationGame` play on their own.
"""

from advgame.games.adt import Amortised, Explicit
from advgame.games.adversarial_training import AdversarialTraining
from advgame.games.cat_and_mouse import CatAndMouse
from advgame.games.free import Free
from advgame.games.imitation import ImitationGame
from advgame.games.l2l import L2L
from advgame.games.las_at import LasAt, LasTrades
from advgame.games.minimax import Minimax, SensitivityTraining
from advgame.games.mixture import Mixture
from advgame.games.pairing import LogitPairing, Mart, Trades
from advgame.games.training import DefenderTraining

__all__ = [
    "L2L",
    "AdversarialTraining",
    "Amortised",
    "CatAndMouse",
    "DefenderTraining",
    "Explicit",
    "Free",
    "ImitationGame",
    "LasAt",
    "LasTrades",
    "LogitPairing",
    "Mart",
    "Minimax",
    "Mixture",
    "SensitivityTraining",
    "Trades",
]
