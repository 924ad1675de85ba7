"""Games: what one training step of each attacker-defender game does.

`DefenderTraining` and `CatAndMouse` are games: the training loop plays them. The others are rules,
which say what one batch does: `DefenderTraining` plays them on a data set, but for LAS-AT's, which
`envs.strategy_selection` plays with the actions of a policy, GAIL's (`agents.gail`), and the duel's
(`envs.duel`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from advgame.lazy import lazily

if TYPE_CHECKING:
    from advgame.games.adaptive import AdaptiveAttack, Gain, LasReward, Progress, Regret
    from advgame.games.adt import AdtAmortised, AdtExp
    from advgame.games.adversarial_training import AdversarialTraining
    from advgame.games.answers import Boosting, DrawnAttacks
    from advgame.games.awp import AWPDefender
    from advgame.games.cat_and_mouse import CatAndMouse
    from advgame.games.costs import DefenderStep, Passes
    from advgame.games.duel import Duel, Lesson, LessonSpace
    from advgame.games.free import Free
    from advgame.games.gail import Gail
    from advgame.games.l2l import L2L
    from advgame.games.las_at import LasAt, LasTrades, Outcome, Payoffs
    from advgame.games.minimax import Minimax, SensitivityTraining
    from advgame.games.mixture import Mixture
    from advgame.games.pairing import LogitPairing, Mart, Trades
    from advgame.games.progress import LearningProgress
    from advgame.games.stopping import LearnedStop, StopAtError
    from advgame.games.strategy import Strategies, StrategySpace, strategy_space
    from advgame.games.training import DefenderTraining, Rules

__all__ = [
    "L2L",
    "AWPDefender",
    "AdaptiveAttack",
    "AdtAmortised",
    "AdtExp",
    "AdversarialTraining",
    "Boosting",
    "CatAndMouse",
    "DefenderStep",
    "DefenderTraining",
    "DrawnAttacks",
    "Duel",
    "Free",
    "Gail",
    "Gain",
    "LasAt",
    "LasReward",
    "LasTrades",
    "LearnedStop",
    "LearningProgress",
    "Lesson",
    "LessonSpace",
    "LogitPairing",
    "Mart",
    "Minimax",
    "Mixture",
    "Outcome",
    "Passes",
    "Payoffs",
    "Progress",
    "Regret",
    "Rules",
    "SensitivityTraining",
    "StopAtError",
    "Strategies",
    "StrategySpace",
    "Trades",
    "strategy_space",
]

if not TYPE_CHECKING:  # of anything else a type checker says that it is not there
    __getattr__, __dir__ = lazily(__name__, __file__)
