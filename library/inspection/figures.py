"""Figures of a dataset as inline SVG: how much of each image is learnt, and the shapes of the buckets."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from library.dataset.plan import Bucket

WIDTH, HEIGHT = 860, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 26, 26, 44  # room around the plot for numbers and names
NUM_BARS = 20
GAP = 3
SHAPE_SIDE = 64  # of the largest bucket's longer side, in SVG units


def weight_histogram(weights: Sequence[float]) -> str:
    """Return the SVG of how many images have which mean weight, in bars of a twentieth; '' of none.

    Args:
        weights: of each masked image, in [0, 1].
    """
    if not weights:
        return ""
    counts = [0] * NUM_BARS
    for weight in weights:
        counts[min(int(weight * NUM_BARS), NUM_BARS - 1)] += 1
    mean, highest = sum(weights) / len(weights), max(counts)
    across, bottom = (WIDTH - LEFT - RIGHT) / NUM_BARS, HEIGHT - BOTTOM
    parts = []
    for value in _steps(highest):
        y = bottom - value / highest * (bottom - TOP)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>'
        )
    for number, count in enumerate(counts):
        x, height = LEFT + number * across, count / highest * (bottom - TOP)
        low, high = number * 100 // NUM_BARS, (number + 1) * 100 // NUM_BARS
        if count:
            parts.append(
                f'<rect class="bar" x="{x + GAP / 2:.1f}" y="{bottom - height:.1f}" width="{across - GAP:.1f}" '
                f'height="{height:.1f}" rx="3"><title>{low} to {high} %: {count}</title></rect>'
            )
    for percent in range(0, 101, 10):
        x = LEFT + percent / 100 * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{percent} %</text>')
    x = LEFT + mean * (WIDTH - LEFT - RIGHT)
    anchor = "end" if mean > 0.8 else "start"
    parts.append(
        f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}"/><text class="axis" '
        f'x="{x + (-6 if anchor == "end" else 6):.1f}" y="{TOP - 9}" text-anchor="{anchor}">mean {mean:.0%}</text>'
    )
    label = (
        f"Mean weight of {len(weights)} masked images: {min(weights):.0%} to {max(weights):.0%}, {mean:.0%} on average."
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        "share of the image that is learnt</text>"
        f'<text class="axis" transform="translate(13 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "images</text></svg>"
    )


def _steps(highest: int) -> list[int]:
    """Return about four whole numbers up to the highest, 0 among them."""
    step = max(1, round(highest / 4))
    return list(range(0, highest + 1, step))


def bucket_shapes(buckets: Sequence[Bucket]) -> str:
    """Return a card of each bucket: its shape to scale, and what it holds."""
    longest = max((max(bucket.size) for bucket in buckets), default=1)
    cards = []
    for bucket in buckets:
        width, height = (side / longest * SHAPE_SIDE for side in bucket.size)
        is_short = bucket.num_draws < bucket.batch_size
        images = f"{len(bucket.samples)} image{'s' * (len(bucket.samples) != 1)}"
        batches = f"{bucket.num_batches} batch{'es' * (bucket.num_batches != 1)}"
        cards.append(
            f'<li{" class=short" if is_short else ""}><svg viewBox="0 0 {SHAPE_SIDE} {SHAPE_SIDE}" aria-hidden="true">'
            f'<rect class="shape" x="{(SHAPE_SIDE - width) / 2:.1f}" y="{(SHAPE_SIDE - height) / 2:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}" rx="2"/></svg><div><b>{bucket.size[0]}×{bucket.size[1]}</b>'
            f"<span>{images}, {bucket.num_draws} draws</span><span>{batches} of {bucket.batch_size}</span></div></li>"
        )
    return f'<ul class="buckets">{"".join(cards)}</ul>' if cards else ""
