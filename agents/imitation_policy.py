"""A finished imitator from its weights: it acts on its task's observations, as SB3's models do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import safetensors
import torch
from gymnasium import spaces
from torch import Tensor, nn

from advgame.errors import InputError
from advgame.imitation.pairs import PairCode
from agents.attacker_file import reading
from envs.actions import into_box

FORMAT = "advgame imitation policy 1"
_ACTOR, _HEAD, _SPREAD = "mlp_extractor.policy_net.", "action_net.", "log_std"
Array = np.ndarray[Any, Any]


class ImitationPolicy(nn.Module):
    """π(a | s) of a trained imitator, in the units of its task.

    It has `predict` as Stable-Baselines3's models, so that their ``evaluate_policy`` takes it, and
    `act`, which `advgame.imitation.record` takes.

    Args:
        env_id: the task, for messages.
        code: how observations become the network's.
        action_space: the task's.
        weights: of SB3's policy; those of its value network are not used.
    """

    def __init__(
        self,
        env_id: str,
        code: PairCode,
        action_space: spaces.Discrete | spaces.Box,
        weights: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.env_id, self.code, self.action_space = env_id, code, action_space
        names = {name.removeprefix(_ACTOR) for name in weights if name.startswith(_ACTOR)}
        layers: list[nn.Module] = []
        for number in sorted({int(name.split(".")[0]) for name in names}):
            layers += [_linear(weights, f"{_ACTOR}{number}."), nn.Tanh()]
        self.body, self.head = nn.Sequential(*layers), _linear(weights, _HEAD)
        first = layers[0] if layers else self.head
        assert isinstance(first, nn.Linear)
        if (first.in_features, self.head.out_features) != (code.observation_size, code.action_size):
            raise ValueError("the weights are of another task")
        spread = weights[_SPREAD] if isinstance(action_space, spaces.Box) else torch.zeros(0)
        self.register_buffer("log_std", spread)
        self.requires_grad_(False).eval()

    def forward(self, observations: Tensor) -> Tensor:
        """Logits of the choices, or means of the actions (B, k), of raw observations (B, d)."""
        outputs: Tensor = self.head(self.body(self.code.observe(observations)))
        return outputs

    @overload
    def act(
        self,
        observations: Tensor,
        *,
        deterministic: bool = True,
        rng: torch.Generator | None = None,
    ) -> Tensor: ...

    @overload
    def act(
        self,
        observations: Array,
        *,
        deterministic: bool = True,
        rng: torch.Generator | None = None,
    ) -> Array: ...

    def act(
        self,
        observations: Tensor | Array,
        *,
        deterministic: bool = True,
        rng: torch.Generator | None = None,
    ) -> Tensor | Array:
        """Actions for raw observations, of the task's space.

        Args:
            observations: (d,) of one environment or (B, d) of several, as the task gives them.
            deterministic: the likeliest action, as reports have it; otherwise one is drawn.
            rng: of the draws; torch's global stream when None.

        Returns:
            () or (B,) integers, or (k,) or (B, k) inside the task's box and of its type; a tensor
            for a tensor, an array for an array.

        Raises:
            InputError: observations of another size, or not finite.
        """
        given = observations
        if not isinstance(given, Tensor):
            given = np.array(given)  # a copy, since torch takes no reversed views
        seen = torch.as_tensor(given, dtype=torch.float32)
        size = len(self.code.shift)
        if seen.ndim not in (1, 2) or seen.shape[-1] != size or not bool(seen.isfinite().all()):
            raise InputError(
                f"{self.env_id} gives finite observations ({size},), or (B, {size}) of several "
                f"environments, not {tuple(seen.shape)} with values such as {_odd(seen)}"
            )
        with torch.no_grad():
            outputs: Tensor = self(seen.reshape(-1, size))
            if isinstance(self.action_space, spaces.Discrete):
                chosen = outputs.argmax(1)
                if not deterministic:
                    chosen = torch.multinomial(outputs.softmax(1), 1, generator=rng)[:, 0]
            else:
                if not deterministic:
                    noise = torch.randn(outputs.shape, generator=rng)
                    outputs = outputs + self.get_buffer("log_std").exp() * noise
                chosen = torch.from_numpy(into_box(outputs.numpy(), self.action_space))
        if seen.ndim == 1:
            chosen = chosen[0]
        if isinstance(observations, Tensor):
            return chosen
        array: Array = chosen.numpy()
        return array

    def predict(
        self,
        observation: Array | dict[str, Array],
        state: tuple[Array, ...] | None = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """`act` in the form of Stable-Baselines3's models.

        Args:
            observation: (d,) or (B, d), raw.
            state: passed on; the policy has no memory.
            episode_start: not used.
            deterministic: the likeliest action.

        Raises:
            InputError: see `act`.
        """
        seen = np.asarray(observation)
        return self.act(seen, deterministic=deterministic), state


def load_policy(path: Path | str, which: Literal["last", "best"] = "last") -> ImitationPolicy:
    """The policy that a run of ``train_gail.py`` trained; nothing in the files runs as code.

        policy = load_policy("runs/NAME")
        evaluate_policy(policy, gymnasium.make("CartPole-v1"))  # Stable-Baselines3's

    Args:
        path: the run's folder, or weights from its ``checkpoints``, which may lie elsewhere by now.
        which: weights of a folder: the last ones, which its report is about, or those of the
            highest true return, which an imitator cannot know.

    Raises:
        InputError: no such weights, a damaged file, or weights of something else.
    """
    path = Path(path)
    if which not in ("last", "best"):
        raise InputError(f"which must be last or best, not {which!r}")
    if path.is_dir():
        folder, path = path, path / "checkpoints" / f"{which}.safetensors"
        if not path.exists():
            others = sorted(one.stem for one in path.parent.glob("*.safetensors"))
            hint = f"it has {', '.join(others)}" if others else "is it a run of train_gail.py?"
            raise InputError(f"{folder} has no {which} weights yet: {hint}")
    metadata, weights = _read(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} holds no policy of train_gail.py: it says {metadata.get('format')!r}"
        )
    with reading(path):
        about = json.loads(metadata["task"])
        shift, scale = (torch.tensor(about[name]) for name in ("shift", "scale"))
        actions = about["actions"]
        space: spaces.Discrete | spaces.Box
        if isinstance(actions, int):
            space = spaces.Discrete(actions)
        else:
            dtype = np.dtype(about.get("dtype", "float32"))  # files of earlier versions have none
            if dtype.kind not in "fiu":
                raise ValueError(f"actions of type {dtype}")
            low, high = (np.array(end, dtype) for end in actions)
            space = spaces.Box(low, high, dtype=dtype.type)
        choices = actions if isinstance(actions, int) else 0
        size = choices or len(actions[0])
        code = PairCode(shift, scale, choices, size, bool(about["absorbing"]))
        return ImitationPolicy(about["env_id"], code, space, weights)


def described(
    env_id: str, code: PairCode, action_space: spaces.Discrete | spaces.Box
) -> dict[str, str]:
    """What the file of a policy's weights says of its task: see `load_policy`."""
    actions: int | list[list[float]]
    if isinstance(action_space, spaces.Discrete):
        actions = int(action_space.n)
    else:
        actions = [action_space.low.tolist(), action_space.high.tolist()]
    about = {
        "env_id": env_id,
        "shift": code.shift.tolist(),
        "scale": code.scale.tolist(),
        "absorbing": code.absorbing,
        "actions": actions,
    }
    if isinstance(action_space, spaces.Box):
        about["dtype"] = str(action_space.dtype)
    return {"format": FORMAT, "task": json.dumps(about)}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and weights of a safetensors file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, str] = file.metadata() or {}
    except FileNotFoundError as error:
        raise InputError(f"no weights file {path}") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file of weights ({error})") from error
    odd = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if odd:
        raise InputError(f"{path} cannot act: its weights {odd[0]} are NaN or infinite")
    return metadata, weights


def _linear(weights: Mapping[str, Tensor], name: str) -> nn.Linear:
    """A layer of the sizes that its weights have."""
    weight, bias = weights[f"{name}weight"], weights[f"{name}bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _odd(seen: Tensor) -> str:
    """A value that is not finite, else the first one."""
    odd = seen[~seen.isfinite()]
    values = odd if len(odd) else seen.flatten()
    return f"{float(values[0]):g}" if len(values) else "none"
