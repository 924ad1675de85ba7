"""GAIL ids `advgame/GAILCartPole-v0` and `GAILMountainCar-v0`: paid by a discriminator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor
from typing_extensions import override

from advgame.choices import Horizon
from advgame.errors import InputError
from advgame.imitation.demonstrations import Demonstrations, shipped
from advgame.imitation.discriminator import REWARDS, Discriminator
from advgame.imitation.layouts import fitting
from advgame.imitation.pairs import PairCode
from advgame.seeding import stream
from envs.actions import as_numbers, rounded
from envs.adapters import SingleEnv
from envs.pictures import PicturedVectorEnv, imitation_picture
from envs.standard import (
    RENDER_MODES,
    check_kind,
    check_num_envs,
    check_render_mode,
    check_reset,
    known_settings,
)
from envs.tasks import make_task, registered

Numbers = Tensor | np.ndarray[Any, Any] | Sequence[float]
_PLACE = ("over", "clock", "return", "length")


class ImitationVectorEnv(PicturedVectorEnv[Tensor]):
    """B episodes of a task, paid by a discriminator instead of by the task.

    Description:
        Generative adversarial imitation (Ho & Ermon 2016): a discriminator tells the agent's
        state-action pairs from an expert's, the agent is paid for passing as the expert. The
        environment pays by the discriminator's parameters ``theta``, which whoever trains the
        discriminator sets between steps.

    Action space:
        The task's: Discrete or a flat Box; tensors or arrays (B,) or (B, k). Others are refused.

    Observation space:
        The task's, brought to about [−1, 1] by constants, float32; with ``horizon="fixed"`` one
        more entry says that the episode is over (absorbing state), the others are 0 there.

    Reward:
        By name, of the expert-is-high logit of the pair (observation acted on, action):
        ``survival`` −log(1 − D), ``cost`` log D, ``neutral`` the logit. The true reward is never
        in it; it stands in ``info["true_reward"]``, the logit in ``info["logit"]``.

    Start:
        The task's own. ``reset(seed=s)`` makes what follows repeatable.

    End:
        ``horizon="task"``: as the task's, terminated by the task or truncated at its time limit.
        How long an episode lasts then tells the reward's sign: with an always positive reward
        surviving pays whatever the discriminator says. ``horizon="fixed"``: never terminated,
        always truncated at the time limit, or earlier where the task truncates itself; after its
        end the task is in an absorbing state, paid by the discriminator too, so that every episode
        is as long (Kostrikov et al. 2019).
        Autoreset is SAME_STEP; ``info["final_obs"]`` and ``info["final_info"]`` (``true_return``,
        ``length``: steps until the task's end) hold what ended.

    Args:
        num_envs: B.
        env_id: the task, a Gymnasium id or ``"module:id"``; CartPole-v1 and MountainCar-v0 run in
            tensors.
        reward: survival, cost or neutral.
        horizon: task or fixed.
        discriminator: fresh (64, 32) tanh when None.
        theta: its parameters (m,); drawn with seed 0 when None. Zeros pay the same for all.
        scale: (shift, scale) of observations, each (d,) and finite, scale above 0: tensors, arrays
            or sequences, which are copied; the task's constants when None.
        stagger: row i begins its first episode as if i/B of its time were over, and is cut off that
            much earlier. Rows that all begin at 0 and all last as long move in step for ever:
            where a rollout is shorter than an episode, each batch is then one and the same window
            of all episodes, and most windows hold absorbing states only.
        device: of states, observations and rewards.
        render_mode: ``"rgb_array"`` or None: the task's picture, and the discriminator's reward of
            each pair. CartPole and MountainCar are drawn here; other tasks draw themselves.
        max_episode_steps: cuts episodes off earlier than the task's own time limit does.

    Raises:
        InputError: unknown names, a task that cannot be imitated, parameters of another size, or a
            scale that is not as above.
    """

    metadata = {  # noqa: RUF012
        "render_modes": RENDER_MODES,
        "render_fps": 30,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    @known_settings()
    @torch.inference_mode(False)
    def __init__(
        self,
        num_envs: int = 16,
        *,
        env_id: str = "CartPole-v1",
        reward: str = "neutral",
        horizon: Horizon = "fixed",
        discriminator: Discriminator | None = None,
        theta: Tensor | None = None,
        scale: tuple[Numbers, Numbers] | None = None,
        stagger: bool = False,
        device: torch.device | str = "cpu",
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        check_render_mode(render_mode)
        check_num_envs(num_envs)
        if max_episode_steps is not None:
            check_num_envs(max_episode_steps, "max_episode_steps")
        if reward not in REWARDS or horizon not in ("task", "fixed"):
            raise InputError(
                f"reward must be {', '.join(REWARDS)} and horizon task or fixed, "
                f"not {reward!r} and {horizon!r}"
            )
        check_kind("discriminator", discriminator, Discriminator, "Discriminator(inputs=7)")
        check_kind("theta", theta, Tensor, "discriminator.init(rng)")
        self.task = make_task(env_id, num_envs, device, render_mode)
        self._limit = self.task.horizon  # the task's own
        if max_episode_steps is not None:
            self.task.horizon = min(self.task.horizon, max_episode_steps)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": self.task.fps}
        self.num_envs, self.reward, self.horizon = num_envs, reward, horizon
        self.env_id = registered(env_id)
        self.task_id = env_id
        """As it was given: a module may register a task of its own under a known id."""
        self.stagger, self.device = stagger, torch.device(device)
        constants = self.task.scale
        if scale is not None:
            constants = _constants(scale, len(constants[0]), self.device)
        self.code = _pair_code(self.task.action_space, constants, horizon)
        self.discriminator = discriminator or Discriminator(self.code.pair_size)
        if self.discriminator.inputs != self.code.pair_size:
            raise InputError(
                f"the pairs of this environment have {self.code.pair_size} entries, "
                f"the discriminator takes {self.discriminator.inputs}"
            )
        if theta is None:
            theta = self.discriminator.init(stream(0, "discriminator"))
        size = self.discriminator.size
        if theta.shape != (size,) or not theta.is_floating_point() or not theta.isfinite().all():
            raise InputError(f"theta must have shape ({size},), of finite floats")
        self.theta = theta.to(self.device, torch.float32)  # as observations are
        self.single_action_space = self.task.action_space
        self.single_observation_space = _observed(self.task.observation_space, self.code)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rng: torch.Generator | None = None

    @property
    def demonstrations(self) -> Demonstrations:
        """The expert trajectories that ship with the package for this task.

        Raises:
            InputError: there are none, or a module has registered a task of its own under the id.
        """
        made_by = gym.spec(self.env_id).entry_point  # a class, or where it lies
        if not str(getattr(made_by, "__module__", made_by)).startswith("gymnasium."):
            raise InputError(
                f"no demonstrations of {self.task_id} come with the package: it is another task "
                f"than Gymnasium's {self.env_id}"
            )
        return shipped(self.env_id)

    def expert_pairs(
        self, demonstrations: Demonstrations, rng: torch.Generator, every: int = 1
    ) -> Tensor:
        """Demonstrations as this environment's discriminator sees them, (E, pair size).

        ``max_episode_steps`` cuts them off as it cuts episodes off.

        Raises:
            InputError: of another task, with actions that it does not take, too short, or longer
                than the task's own time limit.
        """
        if registered(demonstrations.env_id) != self.env_id:
            raise InputError(f"the demonstrations are of {demonstrations.env_id}")
        if (longest := int(demonstrations.lengths.max())) > self._limit:
            raise InputError(
                f"trajectory {int(demonstrations.lengths.argmax())} has {longest} steps: "
                f"{self.env_id} has a time limit of {self._limit}, record it with that"
            )
        pairs = self.code.expert_pairs(demonstrations, self.task.horizon, every, rng)
        both = demonstrations.observations.numpy(), demonstrations.actions.numpy()
        fitting(*both, self.single_action_space)  # `Demonstrations.load` may not have known it
        return pairs.to(self.device)

    @torch.inference_mode(False)
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Begin every row's episode anew; returns observations and infos."""
        seed = check_reset(seed, options, "the episodes share one stream of chance")
        super().reset(seed=seed)
        if seed is not None or self._rng is None:
            seed = seed if seed is not None else int(self.np_random.integers(2**31))
            self._rng = stream(seed, "episodes", self.device)
        self._all = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        self._over = ~self._all
        self._clock = torch.arange(self.num_envs, device=self.device) * self.stagger
        self._clock = self._clock * self.task.horizon // self.num_envs
        self._return = torch.zeros(self.num_envs, device=self.device)
        self._length = torch.zeros(self.num_envs, device=self.device)
        self.task.reset(self._all, self._rng)
        self.observations = self.code.observe(self.task.observe(), self._over)
        self._begin_pictures()
        return self.observations.clone(), {}

    @torch.inference_mode(False)
    def step(
        self, actions: Tensor | np.ndarray[Any, Any], hold: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every episode.

        Args:
            actions: (B,) or (B, k).
            hold: bool (B,), rows that stay where they are, unpaid.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InputError: actions of the wrong shape or outside the space.
        """
        if self._rng is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        acted = self._checked(as_numbers(actions, self.action_space, self.device))
        with torch.no_grad():
            logit = self.discriminator.logits(self.theta, self.code.pairs(self.observations, acted))
        held = torch.zeros_like(self._over) if hold is None else hold.to(self.device)
        live = ~self._over & ~held
        true_reward, terminated, cut = self.task.step(acted, live)
        self._clock = self._clock + ~held
        self._return = self._return + true_reward
        self._length = self._length + live
        truncated = (self._clock >= self.task.horizon) | cut
        if self.horizon == "fixed":
            self._over = self._over | terminated
            terminated = torch.zeros_like(terminated)
        truncated = truncated & ~terminated
        ended = terminated | truncated
        info: dict[str, Any] = {"true_reward": true_reward, "logit": logit}
        info["over"] = self._over.clone()
        info |= {f"_{name}": self._all.clone() for name in list(info)}
        self.observations = self.code.observe(self.task.observe(), self._over)
        reward = torch.where(held, 0.0, REWARDS[self.reward](logit))
        if self.render_mode:
            self._trace(reward, held, ended)
        if ended.any():
            info |= self._begin_again(ended)
        return self.observations.clone(), reward, terminated, truncated, info

    def _trace(self, reward: Tensor, held: Tensor, ended: Tensor) -> None:
        """Remember for the pictures what each pair was paid; rows that end begin anew after it."""
        for row in (~held).nonzero()[:, 0].tolist():
            self._curves[row].append(float(reward[row]))
        rows = ended.nonzero()[:, 0].tolist()
        self._keep_ends(rows)
        for row in rows:
            self._curves[row] = []

    @override
    def _sketch(self, row: int) -> Callable[[], Any]:
        rewards = self._curves[row]
        name = registered(self.env_id).partition("-")[0]
        return partial(
            imitation_picture,
            name=f"GAIL{name}-v0",
            task=self.task.picture(row),
            rewards=rewards[-100:],
            step=len(rewards),
            true_return=float(self._return[row]),
            over=bool(self._over[row]),
        )

    def _begin_again(self, ended: Tensor) -> dict[str, Any]:
        assert self._rng is not None
        last = {
            "final_obs": self.observations,
            "_final_obs": ended,
            "final_info": {
                "true_return": self._return,
                "length": self._length,
                "_true_return": ended,
                "_length": ended,
            },
            "_final_info": ended,
        }
        self._over = self._over & ~ended
        self._clock = torch.where(ended, 0, self._clock)
        self._return = torch.where(ended, 0.0, self._return)
        self._length = torch.where(ended, 0.0, self._length)
        self.task.reset(ended, self._rng)
        self.observations = self.code.observe(self.task.observe(), self._over)
        return last

    def state_dict(self) -> dict[str, Any]:
        """Where the episodes are, and the stream; not ``theta``, which is its trainer's."""
        if self._rng is None:
            raise gym.error.ResetNeeded("call reset() before state_dict()")
        return {
            "task": self.task.state_dict(),
            "rng": self._rng.get_state(),
            **{name: getattr(self, f"_{name}").cpu() for name in _PLACE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; call ``reset()`` first.

        Raises:
            InputError: it is of another number of environments.
        """
        if self._rng is None:
            raise gym.error.ResetNeeded("call reset() before load_state_dict()")
        if (rows := len(state[_PLACE[0]])) != self.num_envs:
            raise InputError(f"the state is of {rows} environments, these are {self.num_envs}")
        self.task.load_state_dict(state["task"])
        self._rng.set_state(state["rng"])
        for name in _PLACE:
            setattr(self, f"_{name}", state[name].to(self.device))
        self.observations = self.code.observe(self.task.observe(), self._over)

    def _checked(self, acted: Tensor) -> Tensor:
        """Actions of the space; choices as int64, since smaller integers wrap around."""
        space = self.single_action_space
        if isinstance(space, spaces.Discrete):
            if acted.is_floating_point() or acted.is_complex() or acted.dtype == torch.bool:
                raise InputError(f"actions must be integers, not {acted.dtype}")
            acted = acted.long()
            if bool((acted < 0).any() | (acted >= int(space.n)).any()):
                raise InputError(f"actions must be integers from 0 to {space.n - 1}")
        elif not bool(torch.isfinite(acted).all()):
            raise InputError("actions contain NaN or infinity")
        else:
            assert isinstance(space, spaces.Box)
            low = torch.as_tensor(space.low, device=self.device)
            high = torch.as_tensor(space.high, device=self.device)
            # in the coarser type of the two: 0.1 as float32 is the end of a float64 box up to 0.1
            floats = [one for one in (acted.dtype, low.dtype) if one.is_floating_point]
            coarser = max(floats, key=lambda one: torch.finfo(one).eps, default=torch.float64)
            given, low, high = (one.to(coarser) for one in (acted, low, high))
            if bool(((given < low) | (given > high)).any()):
                raise InputError(
                    f"actions must lie in {space}: clip them, e.g. numpy.clip(actions, space.low, "
                    "space.high)"
                )
            acted = rounded(acted, space)  # what is paid for is what the task is given
        return acted


class ImitationEnv(SingleEnv):
    """One episode at a time, in NumPy: `ImitationVectorEnv` with B = 1. Arguments as there.

    ``info`` of a step holds true_reward, logit, over and, at the end, true_return and length.
    """

    vector = ImitationVectorEnv

    @property
    def theta(self) -> Tensor:
        """The discriminator's parameters (m,), which whoever trains it sets."""
        theta: Tensor = self.core.theta
        return theta

    @theta.setter
    def theta(self, theta: Tensor) -> None:
        self.core.theta = theta


def _constants(given: Any, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(shift, scale) of observations, each (size,), as tensors of our own."""
    try:
        made = [torch.as_tensor(one, dtype=torch.float32, device=device) for one in given]
        shift, scale = (one.detach().clone() for one in made)
        known = shift.shape == scale.shape == (size,) and bool((scale > 0).all())
        known = known and bool((shift.isfinite() & scale.isfinite()).all())
    except (TypeError, ValueError, RuntimeError):  # no numbers, or not two of them
        known = False
    if not known:
        raise InputError(
            f"scale must be a shift and a scale, {size} finite numbers each and the scale "
            f"above 0, not {given!r}"
        )
    return shift, scale


def _pair_code(
    actions: spaces.Discrete | spaces.Box, scale: tuple[Tensor, Tensor], horizon: Horizon
) -> PairCode:
    choices = int(actions.n) if isinstance(actions, spaces.Discrete) else 0
    size = choices or _shape(actions)[0]
    return PairCode(*scale, choices, size, absorbing=horizon == "fixed")


def _shape(space: spaces.Space[Any]) -> tuple[int, ...]:
    assert space.shape is not None
    return space.shape


def _observed(raw: spaces.Box, code: PairCode) -> spaces.Box:
    """The space of encoded observations; 0, the absorbing state, is inside."""
    shift, scale = code.shift.cpu().numpy(), code.scale.cpu().numpy()
    low, high = (raw.low - shift) / scale, (raw.high - shift) / scale
    if code.absorbing:
        low, high = np.append(np.minimum(low, 0), 0), np.append(np.maximum(high, 0), 1)
    return spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
