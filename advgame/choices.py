"""Named choices that attacks, games and tasks offer, for settings; imports no torch."""

from __future__ import annotations

from typing import Literal

BatchNormMode = Literal["eval", "train"]
"""Batch norm and dropout of a network, in one phase of a game."""
Transport = Literal["fixed", "repo"]
"""Feature Scatter's plan: fixed while the gradient is formed, or differentiated as published."""
Form = Literal["alternating", "shared"]
"""L2L: a forward for each player, or one for both."""
Credit = Literal["mixed", "sample", "batch"]
"""Who is paid for LAS-AT's R2 and R3: see `advgame.games.las_at`."""
Per = Literal["sample", "batch"]
"""A mixture's worst attack: of each sample, or of the batch."""
Horizon = Literal["task", "fixed"]
"""Episodes of an imitation: as the task's, or all as long, with absorbing states."""
Preset = Literal["default", "repo"]
"""Our settings, or the published code's."""
Stake = Literal["robust", "loss"]
"""What a duel is about: robust accuracy on held-out images, or the loss there."""
Order = Literal["simultaneous", "alternating"]
"""Both sides of a duel learn after each match, or one of them for a turn."""
MOVES = ("on", "best", "random")
"""Where a learned attacker's next query begins: the last point, the best one, a random one."""
COLOUR = ("cifar10", "cifar100", "svhn")
"""Recipes of colour images, whose mean and deviation a classifier's first layer takes away."""
PAPERS = ("aa", "adt", "l2l", "las", "madry", "mvm")
"""What names of attacks such as ``adt:pgd20`` begin with; others with a colon are own code."""
TRANSFER = ("transfer", "transfer-mim", "l2l:transfer-fgsm", "l2l:transfer-pgd10")
"""Attacks that are made on another classifier; own code is none, whatever it is called."""
LEAST_CLASSES = 4
"""Of AutoAttack: the loss of its APGD-T looks at the fourth logit."""
FEW_CLASSES = ("pgd100", "cw", "aa:square")
"""Attacks in place of AutoAttack where there are fewer."""
UNION = "members:"
"""Before an attack's name: the adversarial examples that it finds for each member of a mixture."""
