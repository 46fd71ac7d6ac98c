"""Line charts as SVG for the docs, readable on white and on black."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 52
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
TICKS = 5


@dataclass(frozen=True)
class Line:
    """A named line through points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> "Axis":
        low, high = min(values), max(values)
        return cls(low, high if high > low else low + 1.0, start, end)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return [self.low + number / (TICKS - 1) * (self.high - self.low) for number in range(TICKS)]


def chart(title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> str:
    x = Axis.over([value for line in lines for value in line.x], LEFT, WIDTH - RIGHT)
    y = Axis.over([value for line in lines for value in line.y], HEIGHT - BOTTOM, TOP)
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    upright = f'transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)" text-anchor="middle"'
    parts = [
        f'<svg {box} aria-label="{escape(title)}" font-family="sans-serif" font-size="13" fill="#767676">',
        text(LEFT, TOP - 18, title, size=15),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name, anchor="middle"),
        f"<text {upright}>{escape(y_name)}</text>",
        *(grid(y.at(tick), f"{tick:.2f}") for tick in y.ticks()),
        *(text(x.at(tick), HEIGHT - BOTTOM + 20, f"{tick:.2f}", anchor="middle") for tick in x.ticks()),
        *(polyline(line, x, y, colour) for line, colour in zip(lines, COLOURS, strict=False)),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "start", colour: str = "#767676") -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {attributes}>{escape(words)}</text>"


def grid(y: float, name: str) -> str:
    """Return a faint horizontal line with a label at its left end."""
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#999999" stroke-opacity="0.35"/>'
    return line + text(LEFT - 8, y + 4, name, anchor="end")


def polyline(line: Line, x: Axis, y: Axis, colour: str) -> str:
    """Return the line with its name at its right end."""
    points = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in zip(line.x, line.y, strict=True))
    path = f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
    return path + text(x.at(line.x[-1]) + 8, y.at(line.y[-1]) + 4, line.name, colour=colour)
