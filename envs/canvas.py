"""A small canvas on Pillow for the environments' pictures: words, images, lines, curves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]
Array = np.ndarray[Any, Any]

INK, PALE, GRID = (33, 37, 41), (134, 142, 150), (222, 226, 230)
BLUE, RED, GREEN, WOOD = (28, 100, 180), (205, 50, 50), (40, 140, 70), (186, 120, 60)
_FINE = 2  # drawn at twice the size and averaged, which smooths the edges


@lru_cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has Greek letters and comes with Matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", name)), size)


class Canvas:
    """A white picture of ``width`` x ``height`` pixels, the origin at the top left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * _FINE, height * _FINE), "white")
        self._draw = ImageDraw.Draw(self._image)

    def array(self) -> Array:
        """The picture as an array, uint8 (H, W, 3)."""
        return np.asarray(self._image.reduce(_FINE))

    def text(
        self,
        at: Point,
        words: str,
        *,
        size: int = 13,
        colour: Colour = INK,
        bold: bool = False,
        anchor: str = "la",
    ) -> None:
        """Words at a point, which is the one that ``anchor`` names; Pillow's, e.g. left and top."""
        self._draw.text(_fine(at), words, colour, _font(size * _FINE, bold), anchor)

    def line(self, points: Sequence[Point], colour: Colour = INK, width: float = 1) -> None:
        """A line through all points, one after the other."""
        whole = round(width * _FINE)
        self._draw.line([_fine(point) for point in points], colour, whole, joint="curve")

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """A polygon between the points, filled."""
        self._draw.polygon([_fine(point) for point in points], colour)

    def dot(self, at: Point, radius: float, colour: Colour) -> None:
        """A circle around a point, filled."""
        self._draw.circle(_fine(at), radius * _FINE, colour)

    def box(self, at: Point, width: float, height: float, colour: Colour) -> None:
        """A filled rectangle with its upper left corner at a point."""
        x, y = at
        self.polygon([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], colour)

    def image(self, at: Point, side: int, pixels: Array) -> None:
        """An image in [0, 1], (H, W) or (H, W, 3), as large as fits into a square, framed."""
        height, width = pixels.shape[:2]
        scale = side * _FINE / max(height, width)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        shown = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
        shown = shown.convert("RGB").resize(size, Image.Resampling.NEAREST)
        x, y = (round(_FINE * v + (side * _FINE - s) / 2) for v, s in zip(at, size, strict=True))
        self._image.paste(shown, (x, y))
        self._draw.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=PALE)

    def frame(self, at: Point, pixels: Array) -> None:
        """Another picture, uint8 (H, W, 3), as it is."""
        other = Image.fromarray(pixels)
        other = other.resize((other.width * _FINE, other.height * _FINE))
        self._image.paste(other, (round(_FINE * at[0]), round(_FINE * at[1])))

    def fit(self, pixels: Array) -> None:
        """Another picture, uint8 (h, w, 3), as large as fits, in the middle."""
        other = Image.fromarray(pixels)
        width, height = self._image.size
        scale = min(width / other.width, height / other.height)
        other = other.resize((round(other.width * scale), round(other.height * scale)))
        self._image.paste(other, ((width - other.width) // 2, (height - other.height) // 2))

    def fade(self) -> None:
        """Make what has been drawn so far paler."""
        white = Image.new("RGB", self._image.size, "white")
        self._image = Image.blend(self._image, white, 0.65)
        self._draw = ImageDraw.Draw(self._image)


class Chart:
    """A chart on a canvas: axes, then curves in the units of the data.

    Args:
        canvas: where it is drawn.
        at: upper left corner of the plotted area.
        size: width and height of it.
        across: first and last value on the horizontal axis.
        values: what the vertical axis must hold; 0 always is.
        title: stands above.
    """

    def __init__(
        self,
        canvas: Canvas,
        at: Point,
        size: Point,
        across: Point,
        values: Sequence[float],
        title: str,
    ) -> None:
        self.canvas, self._at, self._size, self._across = canvas, at, size, across
        low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
        spare = 0.08 * (high - low) or 1.0
        self._low, self._high = low - spare, high + spare
        left, top = at
        right, bottom = left + size[0], top + size[1]
        canvas.line([(left, top), (left, bottom), (right, bottom)], PALE)
        canvas.line([(left, self._y(0)), (right, self._y(0))], PALE)
        canvas.text((left, top - 18), title, size=12)
        far = [one for one in (low, high) if abs(self._y(one) - self._y(0)) > 12]
        for value in (0.0, *far):
            label = (left - 5, self._y(value))
            canvas.text(label, f"{value:.3g}", size=11, colour=PALE, anchor="rm")

    def _x(self, value: float) -> float:
        first, last = self._across
        return self._at[0] + self._size[0] * (value - first) / max(last - first, 1e-9)

    def _y(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._at[1] + self._size[1] * (1 - share)

    def ticks(self, values: Sequence[int]) -> None:
        """Write numbers below the horizontal axis."""
        for value in values:
            at = (self._x(value), self._at[1] + self._size[1] + 5)
            self.canvas.text(at, str(value), size=11, colour=PALE, anchor="ma")

    def curve(self, first: float, values: Sequence[float], colour: Colour, width: float) -> None:
        """Values at first, first + 1, …, joined by a line."""
        points = [(self._x(first + i), self._y(value)) for i, value in enumerate(values)]
        if len(points) > 1:
            self.canvas.line(points, colour, width)

    def line(self, first: Point, last: Point, colour: Colour, width: float = 1.5) -> None:
        """A straight line from one (x, value) to another."""
        ends = [(self._x(x), self._y(value)) for x, value in (first, last)]
        self.canvas.line(ends, colour, width)

    def dot(self, x: float, y: float, colour: Colour, radius: float = 4) -> None:
        """A single value, drawn as a dot."""
        self.canvas.dot((self._x(x), self._y(y)), radius, colour)


def _fine(at: Point) -> Point:
    return at[0] * _FINE, at[1] * _FINE
