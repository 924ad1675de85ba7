"""Tasks with boxes of actions that are no float32 up to ±1: float64, whole numbers, without 0."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Boxed(gymnasium.Env):
    """Insists on actions of its own space and type; returns a reversed view of its state."""

    def __init__(self, low, high, dtype, render_mode=None):
        self.action_space = spaces.Box(low, high, (2,), dtype)
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=3).astype(np.float32)
        return self.state[::-1], {}

    def step(self, action):
        assert self.action_space.contains(action), action
        assert action.dtype == self.action_space.dtype
        self.state = 0.9 * self.state
        return self.state[::-1], -1.0, False, False, {}


FINE, WHOLE, HIGH = "Fine-v0", "Whole-v0", "High-v0"
for name, box in {
    FINE: (-0.1, 0.1, np.float64),
    WHOLE: (-2, 2, np.int64),
    HIGH: (0.5, 1, np.float32),
}.items():
    settings = dict(zip(("low", "high", "dtype"), box, strict=True))
    gymnasium.register(name, Boxed, max_episode_steps=6, kwargs=settings)
