"""The pictures of the environments, `render_mode="rgb_array"`: who keeps them, how they look."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from torch import Tensor
from typing_extensions import override

from envs.canvas import BLUE, GREEN, GRID, INK, PALE, RED, WOOD, Array, Canvas, Chart, Colour

WIDTH, HEIGHT = 600, 400
_SEEN = TypeVar("_SEEN")


def drawn(render_mode: str | None, begun: bool) -> bool:
    """Whether render() draws; a warning where it does not.

    Args:
        render_mode: of the environment.
        begun: whether it has been reset.

    Raises:
        gymnasium.error.ResetNeeded: before the first reset.
    """
    if render_mode is None:
        gym.logger.warn('render() draws nothing without render_mode="rgb_array"')
        return False
    if not begun:
        raise gym.error.ResetNeeded("call reset() before render()")
    return True


class PicturedVectorEnv(VectorEnv[_SEEN, Tensor, Tensor]):
    """A vector environment that draws its rows where it was made with ``render_mode``.

    A picture shows where the last `step` or `reset` has led. Of a row whose episode has ended it
    is the end, also where the next episode has begun within the same step.
    """

    _ended: dict[int, Callable[[], Array]] | None = None

    @override
    def render(self) -> tuple[Array, ...] | None:
        """A picture per row, each uint8 (H, W, 3); None, and a warning, without render mode.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if not drawn(self.render_mode, self._ended is not None):
            return None
        ended, rows = self._ended or {}, range(self.num_envs)
        return tuple((ended.get(row) or self._sketch(row))() for row in rows)

    def show_present(self) -> None:
        """Draw rows as they are from now on, and their ends no longer."""
        self._ended = {}

    @abstractmethod
    def _sketch(self, row: int) -> Callable[[], Array]:
        """What draws a row as it is now, of copies."""

    def _begin_pictures(self) -> None:
        """At each reset: the rows begin, and so do the curves of what each has been paid."""
        self._ended = {}
        self._curves: list[list[float]] = [[] for _ in range(self.num_envs)]

    def _keep_ends(self, rows: Iterable[int]) -> None:
        """Remember rows as they are now, before another episode begins in them."""
        self._ended = {row: self._sketch(row) for row in rows}


def attack_picture(
    *,
    name: str,
    images: tuple[Array, Array],
    scale: float,
    classes: tuple[int, int],
    confidence: float,
    margins: Sequence[float],
    budget: int,
    fooled: bool,
    action: str,
) -> Array:
    """An image under attack: the image, the perturbation, the point of the last query, margins.

    Args:
        name: of the environment.
        images: the clean image and the point of the last query, each (C, H, W) in [0, 1].
        scale: the perturbation that gets the full colour.
        classes: the true class, and the predicted one at that point.
        confidence: its probability.
        margins: at each query so far.
        budget: queries of the episode.
        fooled: whether any query has fooled the classifier.
        action: the last one, in words.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    (clean, point), (true, seen) = images, classes
    used = len(margins)
    canvas.text((16, 12), name, bold=True, size=15)
    state, colour = "not fooled yet", PALE
    if fooled:
        state, colour = "fooled", RED
    elif used >= budget:
        state, colour = "queries are spent", GREEN
    canvas.text((584, 12), f"query {used} of {budget}: {state}", colour=colour, anchor="ra")
    said = f"query: class {seen}, {confidence:.0%}"
    _triple(canvas, clean, point, scale, f"image: class {true}", said, RED if seen != true else INK)
    canvas.text((16, 238), action, size=12, colour=PALE)
    title = "margin at each query, and the best so far (above 0: fooled)"
    chart = Chart(canvas, (56, 278), (528, 92), (1, budget), margins, title)
    chart.ticks(sorted({1, used, *([budget] if used < 0.9 * budget else [])}))
    best = np.maximum.accumulate(margins).tolist()
    chart.curve(1, best, GRID, 5)
    chart.curve(1, margins, BLUE, 1.5)
    for query, value in enumerate(margins, 1):
        chart.dot(query, value, RED if value > 0 else BLUE, 2.5 if budget > 25 else 4)
    return canvas.array()


def strategy_picture(
    *,
    images: tuple[Array, Array | None],
    scale: float,
    choices: Sequence[tuple[str, Sequence[str], int | None]],
    terms: dict[str, float],
    rewards: Sequence[float],
    step: int,
) -> Array:
    """What was chosen for an image, what PGD made of it, and what it paid.

    Args:
        images: the clean image and, once it was played, the adversarial example.
        scale: the perturbation that gets the full colour.
        choices: name, options in words and index of the option chosen, None before.
        terms: of the last reward, by name.
        rewards: of this row's last steps, 100 at most.
        step: training steps of the classifier.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    clean, adversarial = images
    canvas.text((16, 12), "StrategySelection-v0", bold=True, size=15)
    canvas.text((584, 12), f"step {step} of the classifier", colour=PALE, anchor="ra")
    said = "no strategy chosen yet"
    if adversarial is not None:
        said = f"example: loss {terms['loss']:.2f}"
    _triple(canvas, clean, adversarial, scale, "image", said, INK)
    for line, (name, options, chosen) in enumerate(choices):
        y = 274 + 32 * line
        canvas.text((16, y), name, size=12, anchor="lm")
        canvas.line([(90, y), (260, y)], GRID, 2)
        for i in range(len(options)):
            x = 90 + 170 * i / max(len(options) - 1, 1)
            canvas.dot((x, y), 6 if i == chosen else 2.5, RED if i == chosen else PALE)
        if chosen is not None:
            canvas.text((272, y), options[chosen], size=12, colour=RED, anchor="lm")
    parts = ", ".join(f"{k} {v:.2f}" for k, v in terms.items() if k != "loss")
    canvas.text((354, 238), parts, size=12, colour=PALE)
    title = f"reward {rewards[-1]:.2f}" if rewards else "reward"
    span = 1, max(len(rewards), 10)
    chart = Chart(canvas, (354, 274), (230, 96), span, rewards, title)
    chart.ticks([first := step - len(rewards) + 1, first + span[1] - 1])
    chart.curve(1, rewards, BLUE, 1.5)
    if rewards:
        chart.dot(len(rewards), rewards[-1], BLUE, 3)
    return canvas.array()


def duel_picture(
    *,
    step: int,
    steps: int,
    about: str,
    curve: Sequence[float],
    every: int,
    choices: Sequence[Sequence[float]],
    names: Sequence[str],
    images: tuple[Array, Array],
    scale: float,
) -> Array:
    """The match so far: the standing, both sides' choices, three adversarial images.

    Args:
        step: steps played.
        steps: of the match.
        about: what is played for, in words.
        curve: the standing before the first step, and every so many steps.
        every: steps between two values of the curve.
        choices: of each step, where each choice lies in its list, in [0, 1].
        names: of the choices, the attacker's three first.
        images: clean and attacked, each (n, C, H, W) in [0, 1].
        scale: the perturbation that gets the full colour.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    paid = curve[-1] - curve[0]
    canvas.text((16, 12), "duel_v0", bold=True, size=15)
    said = f"step {step} of {steps}: attacker {0.0 - paid:+.3f}, defender {paid:+.3f}"
    canvas.text((584, 12), said, colour=PALE, anchor="ra")
    chart = Chart(canvas, (56, 66), (268, 136), (0, steps), curve, f"{about}: {curve[-1]:.3f}")
    chart.ticks([0, steps])
    for start, pair in enumerate(pairwise(curve)):
        chart.line((start * every, pair[0]), ((start + 1) * every, pair[1]), BLUE)
    chart.dot((len(curve) - 1) * every, curve[-1], BLUE, 3)
    canvas.text((348, 48), f"attacked images, perturbation (±{scale:.2g})", size=12)
    for i, (clean, point) in enumerate(zip(*images, strict=True)):
        canvas.image((348 + 82 * i, 68), 72, _colours(point))
        canvas.image((348 + 82 * i, 148), 72, _signed((point - clean) / scale))
    for side, first, last in (("attacker", 0, 3), ("defender", 3, len(names))):
        left = 16 if side == "attacker" else 308
        canvas.text((left, 240), f"{side}'s choices", size=12, bold=True)
        for row, name in enumerate(names[first:last]):
            _track(
                canvas, (left, 262 + 32 * row), name, [one[first + row] for one in choices], steps
            )
    return canvas.array()


def _track(
    canvas: Canvas, at: tuple[float, float], name: str, values: Sequence[float], steps: int
) -> None:
    """One choice over the match, from the first option at the bottom to the last at the top."""
    left, top = at
    canvas.text((left, top + 11), name, size=12, anchor="lm")
    canvas.line([(left + 88, top + 22), (left + 276, top + 22)], GRID)
    width = 188 / steps
    for step, value in enumerate(values):
        height = 2 + 20 * value
        place = (left + 88 + width * step, top + 22 - height)
        canvas.box(place, max(width - 1, 0.5), height, RED if step == len(values) - 1 else BLUE)


def imitation_picture(
    *,
    name: str,
    task: Callable[[], Array],
    rewards: Sequence[float],
    step: int,
    true_return: float,
    over: bool,
) -> Array:
    """The task's own picture above the discriminator's reward of each pair.

    Args:
        name: of the environment.
        task: draws the task, (h, WIDTH, 3).
        rewards: of the last pairs, 100 at most.
        step: of the episode, which is the last one's.
        true_return: so far.
        over: whether the episode rests in the absorbing state.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    canvas.frame((0, 34), task())
    if over:
        canvas.fade()
        canvas.text((300, 150), "over: absorbing state", bold=True, size=18, anchor="mm")
    canvas.text((16, 12), name, bold=True, size=15)
    canvas.text((584, 12), f"step {step}, true return {true_return:.0f}", colour=PALE, anchor="ra")
    first = step - len(rewards) + 1
    title = "the discriminator's reward at each step"
    if rewards:
        title += f": {rewards[-1]:+.2f}"
    span = first, first + 99
    chart = Chart(canvas, (56, 300), (528, 76), span, rewards, title)
    chart.ticks([first, first + 99][: 1 + (len(rewards) < 90)])
    chart.curve(first, rewards, BLUE, 1.5)
    if rewards:
        chart.dot(step, rewards[-1], BLUE, 3.5)
    return canvas.array()


def cart_pole_picture(position: float, angle: float, *, reach: float, length: float) -> Array:
    """A cart on its track with its pole upright at angle 0; lengths in the task's units."""
    canvas = Canvas(WIDTH, TASK_HEIGHT)
    unit, ground = 110.0, 186.0
    centre = 300 + unit * position
    canvas.line([(0, ground), (WIDTH, ground)], PALE, 2)
    for end in (-reach, reach):  # beyond these the episode is over
        canvas.line([(300 + unit * end, ground - 8), (300 + unit * end, ground + 8)], RED, 3)
    top = ground - 34
    tip = centre + 2 * length * unit * np.sin(angle), top - 2 * length * unit * np.cos(angle)
    for wheel in (-18, 18):
        canvas.dot((centre + wheel, ground - 7), 7, INK)
    canvas.box((centre - 30, top), 60, 22, BLUE)
    canvas.line([(centre, top + 4), tip], WOOD, 8)
    canvas.dot(tip, 4, WOOD)
    canvas.dot((centre, top + 4), 4, INK)
    return canvas.array()


def mountain_car_picture(position: float, *, ends: tuple[float, float], goal: float) -> Array:
    """A car on the curve sin(3x), with a flag at the goal."""
    canvas = Canvas(WIDTH, TASK_HEIGHT)

    def at(x: float) -> tuple[float, float]:
        share = (x - ends[0]) / (ends[1] - ends[0])
        return 20 + 560 * share, 128 - 78 * float(np.sin(3 * x))

    hill = [at(x) for x in np.linspace(*ends, 121).tolist()]
    canvas.polygon([*hill, (580, TASK_HEIGHT), (20, TASK_HEIGHT)], (233, 236, 239))
    canvas.line(hill, PALE, 2)
    x, y = at(goal)
    canvas.line([(x, y), (x, y - 40)], INK, 2)
    canvas.polygon([(x, y - 40), (x + 20, y - 33), (x, y - 26)], RED)
    (x, y), (ahead, rise) = at(position), at(position + 1e-3)
    along = np.array([ahead - x, rise - y]) / np.hypot(ahead - x, rise - y)
    up = np.array([along[1], -along[0]])
    corners = ((-18, 7), (18, 7), (18, 13), (9, 20), (-9, 20), (-18, 13))
    canvas.polygon([tuple((x, y) + a * along + b * up) for a, b in corners], BLUE)
    for wheel in (-11, 11):
        canvas.dot(tuple((x, y) + wheel * along + 6 * up), 6, INK)
    return canvas.array()


def fitted(pixels: Array) -> Array:
    """A task's own frame, uint8 (h, w, 3), on white in the size of `imitation_picture`'s."""
    canvas = Canvas(WIDTH, TASK_HEIGHT)
    canvas.fit(pixels)
    return canvas.array()


TASK_HEIGHT = 226
"""Of a task's own picture in `imitation_picture`."""


def _triple(
    canvas: Canvas,
    clean: Array,
    point: Array | None,
    scale: float,
    before: str,
    after: str,
    colour: Colour,
) -> None:
    """A clean image, the perturbation and the perturbed image side by side, with captions."""
    delta = None if point is None else point - clean
    shown = (_colours(clean), None if delta is None else _signed(delta / scale))
    captions = (before, f"perturbation (±{scale:.3g})", after)
    for i, pixels in enumerate((*shown, None if point is None else _colours(point))):
        x = 16 + 200 * i
        canvas.text((x, 38), captions[i], size=12, colour=colour if i == 2 else INK)
        canvas.image((x, 58), 168, np.full((1, 1), 0.95) if pixels is None else pixels)


def _colours(image: Array) -> Array:
    """(C, H, W) as (H, W, 3) or (H, W); of other channels than three, their mean."""
    return image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0)


def _signed(values: Array) -> Array:
    """A perturbation (C, H, W) in ±1: around grey; of one channel red is more, blue is less."""
    if len(values) == 3:
        return 0.5 + _colours(values) / 2
    value = np.clip(values.mean(0), -1, 1)[..., None]
    more, less, none = (np.array(c) / 255 for c in (RED, BLUE, (255, 255, 255)))
    mixed: Array = none + np.where(value > 0, value * (more - none), -value * (less - none))
    return mixed
