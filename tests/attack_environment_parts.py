"""The attack environments by name and kind, and settings of theirs."""

import torch

from advgame.threat import Linf
from envs.attack import AttackEnv, AttackVectorEnv
from envs.patches import BlackBoxAttackEnv, BlackBoxAttackVectorEnv

IDS = ("advgame/Attack-v0", "advgame/BlackBoxAttack-v0")
VECTORS = (AttackVectorEnv, BlackBoxAttackVectorEnv)
SINGLES = (AttackEnv, BlackBoxAttackEnv)
EASY = Linf(0.3)  # about half of the images fall within a few random moves
# each environment with settings in which random play both succeeds and runs out of queries
BOTH_ENDS = {
    AttackVectorEnv: {"queries": 4, "threat": EASY},
    BlackBoxAttackVectorEnv: {"queries": 6, "threat": Linf(0.8)},
}


def same(one, two):
    for a, b in zip(one, two, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
