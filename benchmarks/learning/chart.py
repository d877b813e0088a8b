"""Learning curves as a picture, with Pillow alone."""

import itertools
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

HEIGHT = 560  # pixels
LEFT, TOP, BOTTOM = 70, 40, 50  # margins
RIGHT = 710  # edge of the plot; the legend stands behind it, as wide as its names
LEGEND = 52  # pixels from that edge to the names
INK, GRID, PAPER = (30, 30, 30), (225, 225, 225), (255, 255, 255)
# Okabe and Ito's palette, which colour-blind eyes can tell apart; more lines than colours are dashed.
COLOURS = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (213, 94, 0),
    (0, 114, 178),
    (204, 121, 167),
)

Point = tuple[float, float]


def line_chart(
    lines: Mapping[str, Sequence[Point]], *, title: str, x_label: str, y_label: str
) -> Image.Image:
    """A picture of named lines, each a sequence of (x, y) in the order of x."""
    font = ImageFont.load_default(size=13)
    names = max((font.getlength(name) for name in lines), default=0)
    canvas = Image.new("RGB", (RIGHT + LEGEND + math.ceil(names) + LEFT // 2, HEIGHT), PAPER)
    draw = ImageDraw.Draw(canvas)
    points = [point for line in lines.values() for point in line]
    x_ticks = ticks(0.0, max((x for x, _ in points), default=1.0))
    y_ticks = ticks(min((y for _, y in points), default=0.0), max((y for _, y in points), default=1.0))

    def place(point: Point) -> Point:
        return (
            _scaled(point[0], x_ticks, LEFT, RIGHT),
            _scaled(point[1], y_ticks, HEIGHT - BOTTOM, TOP),
        )

    for x in x_ticks:
        across = place((x, 0))[0]
        draw.line([(across, TOP), (across, HEIGHT - BOTTOM)], fill=GRID)
        draw.text((across, HEIGHT - BOTTOM + 6), f"{x:g}", fill=INK, font=font, anchor="mt")
    for y in y_ticks:
        up = place((0, y))[1]
        draw.line([(LEFT, up), (RIGHT, up)], fill=GRID)
        draw.text((LEFT - 6, up), f"{y:g}", fill=INK, font=font, anchor="rm")
    draw.text((LEFT, TOP // 2), title, fill=INK, font=ImageFont.load_default(size=15), anchor="lm")
    draw.text(((LEFT + RIGHT) / 2, HEIGHT - 12), x_label, fill=INK, font=font, anchor="mm")
    draw.text((6, TOP - 8), y_label, fill=INK, font=font, anchor="lm")
    for number, (name, line) in enumerate(lines.items()):
        colour, dashed = COLOURS[number % len(COLOURS)], number >= len(COLOURS)
        _draw_line(draw, [place(point) for point in line], colour, dashed=dashed)
        height = TOP + 10 + 20 * number
        _draw_line(draw, [(RIGHT + 15, height), (RIGHT + 45, height)], colour, dashed=dashed)
        draw.text((RIGHT + LEGEND, height), name, fill=INK, font=font, anchor="lm")
    return canvas


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in about five equal steps, from at or below `low` to at or above `high`."""
    if not high > low:
        return [low - 1, low, low + 1]
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def _scaled(value: float, marks: Sequence[float], start: float, end: float) -> float:
    return start + (value - marks[0]) / (marks[-1] - marks[0]) * (end - start)


def _draw_line(
    draw: ImageDraw.ImageDraw, points: Sequence[Point], colour: tuple[int, int, int], *, dashed: bool
) -> None:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        parts = max(1, int(math.hypot(x1 - x0, y1 - y0) / 6)) if dashed else 1
        for part in range(0, parts, 2):
            a, b = part / parts, (part + 1) / parts
            ends = [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (a, b)]
            draw.line(ends, fill=colour, width=2)
    for x, y in points:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
