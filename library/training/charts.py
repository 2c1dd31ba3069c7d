"""Line charts as inline SVG: no scripts, no fonts of their own; colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 44  # room around the plot for numbers and the axes' names
MAX_POINTS = 1200  # of one line; more cannot be told apart at this width


def loss_chart(losses: Sequence[tuple[int, float]], validations: Sequence[tuple[int, float]] = ()) -> str:
    """Return the SVG of a loss curve: every step thin, the smoothed curve thick, that of images held back beside it.

    Args:
        losses: (step, loss), steps rising; losses that are no numbers are left out.
        validations: (step, loss) on images that are held back, steps rising, likewise.
    """
    points: list[Point] = [(float(step), loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        return ""
    smooth = smoothed(points)
    held_back: list[Point] = [(float(step), loss) for step, loss in validations if math.isfinite(loss)]
    highest = max(y for _, y in [*smooth, *held_back])
    ceiling = max(highest * 1.05, quantile([y for _, y in points], 0.99))
    num_above = sum(y > ceiling for _, y in points)
    label = (
        f"Loss over {len(points)} steps: smoothed {_number(smooth[0][1])} at first, {_number(smooth[-1][1])} at last."
    )
    if held_back:
        label += f" Of images held back: {_number(held_back[0][1])} at first, {_number(held_back[-1][1])} at last."
    plot = Plot((points[0][0], points[-1][0]), (min(y for _, y in [*points, *held_back]), ceiling), HEIGHT, "loss")
    note = f"{num_above} higher values are cut off" if num_above else ""
    lines = [("raw", points), ("smooth", smooth)] + ([("validation", held_back)] if held_back else [])
    return plot.svg(lines, label, "step", note)


def rate_chart(rates: Sequence[tuple[int, float]]) -> str:
    """Return the SVG of a learning rate over the steps, low and wide."""
    points: list[Point] = [(float(step), rate) for step, rate in rates if math.isfinite(rate)]
    if not points:
        return ""
    label = f"Learning rate: {points[0][1]:.3g} at first, {points[-1][1]:.3g} at last."
    plot = Plot((points[0][0], points[-1][0]), (0.0, max(y for _, y in points) * 1.05), HEIGHT // 2, "learning rate")
    return plot.svg([("rate", points)], label, "step", "")


def region_chart(
    inside: Sequence[tuple[int, float]],
    outside: Sequence[tuple[int, float]],
    held_back: tuple[Sequence[tuple[int, float]], Sequence[tuple[int, float]]] = ((), ()),
) -> str:
    """Return the SVG of the losses inside and outside of masks: every step thin, smoothed thick.

    Args:
        inside: (step, loss), steps rising; losses that are no numbers are left out.
        outside: likewise.
        held_back: both of images that are held back, dashed.
    """
    raw = [_points(each) for each in (inside, outside)]
    smooth = [smoothed(each) for each in raw]
    dashed = [_points(each) for each in held_back]
    everything = [point for each in (*raw, *dashed) for point in each]
    if not everything:
        return ""
    steps = [x for x, _ in everything]
    highest = max(y for each in (*smooth, *dashed) for _, y in each)
    ceiling = max(highest * 1.05, quantile([y for _, y in everything], 0.99))
    names = "inside", "outside"
    told = [
        f"{name} {_number(each[0][1])} at first, {_number(each[-1][1])} at last"
        for name, each in zip(names, smooth, strict=True)
        if each
    ]
    plot = Plot((min(steps), max(steps)), (min(y for _, y in everything), ceiling), HEIGHT, "loss")
    kinds = [f"{kind}{name}" for kind in ("each ", "", "dashed ") for name in names]
    lines = [(kind, each) for kind, each in zip(kinds, [*raw, *smooth, *dashed], strict=True) if each]
    return plot.svg(lines, f"Loss inside and outside of the masks: {'; '.join(told)}.", "step", "")


def drift_chart(drifts: Sequence[tuple[int, float]], steps: tuple[int, int]) -> str:
    """Return the SVG of how far predictions are from the untrained model's outside of masks, low and wide.

    Args:
        drifts: (step, drift), steps rising.
        steps: the first and the last of the axis, which is that of the chart above.
    """
    points = _points(drifts)
    if not points:
        return ""
    smooth = smoothed(points)
    label = f"Drift outside of the masks: {_number(smooth[0][1])} at first, {_number(smooth[-1][1])} at last."
    plot = Plot((steps[0], steps[1]), (0.0, max(y for _, y in points) * 1.05), HEIGHT // 2, "drift outside")
    return plot.svg([("each drift", points), ("drift", smooth)], label, "step", "")


def _points(values: Sequence[tuple[int, float]]) -> list[Point]:
    return [(float(step), value) for step, value in values if math.isfinite(value)]


class Plot:
    """A plot area: where values lie on the page."""

    def __init__(self, x_range: Point, y_range: Point, height: int, y_name: str) -> None:
        """Take the ranges of values to be shown; empty ones are widened."""
        self.x_min, self.x_max = _widened(*x_range, whole=True)
        self.y_min, self.y_max = _widened(*y_range, whole=False)
        self.height = height
        self.y_name = y_name

    def place(self, x: float, y: float) -> Point:
        """Return where a value lies, in SVG units."""
        across = (x - self.x_min) / (self.x_max - self.x_min)
        up = (y - self.y_min) / (self.y_max - self.y_min)
        return LEFT + across * (WIDTH - LEFT - RIGHT), self.height - BOTTOM - up * (self.height - TOP - BOTTOM)

    def svg(self, lines: Sequence[tuple[str, Sequence[Point]]], label: str, x_name: str, note: str) -> str:
        """Return the chart; each line has a CSS class and points; label describes all of it in words."""
        clip = f"clip-{lines[0][0].replace(' ', '-')}"
        bottom = self.height - BOTTOM
        paths = "".join(
            f'<path class="line {kind}" clip-path="url(#{clip})" d="{self._path(points)}"/>' for kind, points in lines
        )
        middle = (TOP + bottom) / 2
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(label)}">'
            f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 2}" width="{WIDTH - LEFT - RIGHT}" '
            f'height="{bottom - TOP + 4}"/></clipPath>{self._grid()}{paths}'
            f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{self.height - 6}" '
            f'text-anchor="middle">{x_name}</text>'
            f'<text class="axis" transform="translate(14 {middle}) rotate(-90)" '
            f'text-anchor="middle">{self.y_name}</text>'
            f'<text class="axis" x="{WIDTH - RIGHT}" y="{self.height - 6}" text-anchor="end">'
            f"{escape(note)}</text></svg>"
        )

    def _grid(self) -> str:
        parts = []
        for value in ticks(self.y_min, self.y_max, 5 if self.height == HEIGHT else 3):
            _, y = self.place(self.x_min, value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
            )
        bottom = self.height - BOTTOM
        for value in ticks(self.x_min, self.x_max, 8, whole=True):
            x, _ = self.place(value, self.y_min)
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:,.0f}</text>'
            )
        return "".join(parts)

    def _path(self, points: Sequence[Point]) -> str:
        placed = [self.place(x, y) for x, y in thinned(points)]
        if len(placed) == 1:
            placed.append((placed[0][0] + 0.1, placed[0][1]))  # with round ends a point is seen
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return points with y averaged over a window of about a twelfth of the curve, centred, one-sided at the ends."""
    reach = max(len(points) // 24, 1)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for index, (x, _) in enumerate(points):
        start, end = max(0, index - reach), min(len(points), index + reach + 1)
        result.append((x, (sums[end] - sums[start]) / (end - start)))
    return result


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most MAX_POINTS of the points: of each stretch the lowest and the highest, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return list(points)
    kept: list[Point] = [points[0]]
    num_stretches = MAX_POINTS // 2 - 1
    for stretch in range(num_stretches):
        part = points[stretch * len(points) // num_stretches : (stretch + 1) * len(points) // num_stretches]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return about count round values from low to high: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(step, 1.0)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that the share of values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def _widened(low: float, high: float, *, whole: bool) -> Point:
    """Return a range that is not empty, around low where it was; values leave a little air above and below."""
    if whole:
        return (low - 1, high + 1) if high <= low else (low, high)
    if high <= low:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    return (low, high) if low == 0 else (max(0.0, low - (high - low) * 0.05) if low > 0 else low, high)


def _number(value: float) -> str:
    """Return a number as short as it can be told: 0.125, 2e-05."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
