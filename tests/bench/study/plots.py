"""Two small drawings as SVG: lines over the active share, and bars with intervals."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 230, 40, 40
COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777"),
    *("#994455", "#004488", "#997700", "#44aa99", "#882255", "#000000"),
)
ROW_HEIGHT = 28
LABEL_WIDTH = 270


@dataclass(frozen=True, slots=True)
class Point:
    line: str
    share: float
    value: float


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    value: float
    low: float
    high: float


def lines_svg(title: str, points: Iterable[Point]) -> str:
    """One line for each `Point.line`, from the largest share to the smallest."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.line, []).append(point)
    everything = [point for line in lines.values() for point in line]
    top = max([2.0, *(point.value for point in everything)])
    shares = sorted({point.share for point in everything} | {0.5, 0.75})
    across = (WIDTH - LEFT - RIGHT) / (shares[-1] - shares[0])

    def at(point: Point) -> tuple[float, float]:
        x = LEFT + (shares[-1] - point.share) * across
        y = HEIGHT - BOTTOM - (point.value - 1) / (top - 1) * (HEIGHT - TOP - BOTTOM)
        return x, y

    drawn = [_text(LEFT, 20, f"{title}, by the share of FFN neurons active", bold=True)]
    for share in shares:
        x, y = at(Point("", share, 1.0))
        drawn += [_line((x, y), (x, TOP), "#dddddd"), _text(x - 14, y + 16, f"{100 * share:g} %")]
    for step in range(5):
        value = 1 + step * (top - 1) / 4
        y = at(Point("", shares[-1], value))[1]
        drawn += [_line((LEFT, y), (WIDTH - RIGHT, y), "#dddddd"), _text(16, y + 4, f"{value:.2f}")]
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(point) for point in sorted(line, key=lambda each: -each.share)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        y = TOP + 18 * number
        drawn.append(_line((WIDTH - RIGHT + 14, y), (WIDTH - RIGHT + 34, y), colour))
        drawn.append(_text(WIDTH - RIGHT + 40, y + 4, name))
    return _svg(HEIGHT, drawn)


def bars_svg(title: str, bars: Iterable[Bar]) -> str:
    """Below one another, each with its interval."""
    known = list(bars)
    most = max([1.0, *(bar.high for bar in known)])
    width = WIDTH - LABEL_WIDTH - 80
    drawn = [_text(10, 20, title, bold=True)]
    for number, bar in enumerate(known):
        y = TOP + number * ROW_HEIGHT

        def x(value: float) -> float:
            return LABEL_WIDTH + max(0.0, value) / most * width

        size = x(bar.value) - LABEL_WIDTH
        drawn.append(_text(10, y + 14, bar.name))
        drawn.append(
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{size:.1f}" height="18" fill="{COLOURS[0]}"/>'
        )
        drawn.append(_line((x(bar.low), y + 9), (x(bar.high), y + 9), "#000000"))
        drawn.append(_text(x(max(bar.value, bar.high)) + 6, y + 14, f"{bar.value:.2f}"))
    return _svg(TOP + ROW_HEIGHT * max(1, len(known)), drawn)


def _svg(height: int, drawn: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12"'
    back = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join([f"{head} {style}>", back, *drawn, "</svg>"]) + "\n"


def _line(start: tuple[float, float], end: tuple[float, float], colour: str) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, words: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{weight}>{escape(words)}</text>'
