"""What the report tells of masks: the losses inside and outside of them, and what each lets through."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from library.training.charts import drift_chart, region_chart, smoothed

if TYPE_CHECKING:
    from library.training.metrics import MaskFigures

Figures = Sequence[tuple[int, "MaskFigures"]]  # by optimizer step, steps rising
Shares = Sequence[tuple[str, float]]  # name of an image, mean weight of its cells

MOST_BARS = 40


def curves(figures: Figures, validations: Figures) -> str:
    """Return the charts of the losses inside and outside, and of the drift, with their legend; "" without any."""
    inside, outside, drift = (series(figures, name) for name in ("inside", "outside", "drift"))
    held_back = series(validations, "inside"), series(validations, "outside")
    chart = region_chart(inside, outside, held_back)
    if not chart:
        return ""
    dashed = '<span class="key dashed"></span>images held back' if any(held_back) else ""
    legend = (
        '<p class="legend"><span class="key inside"></span>inside the masks '
        f'<span class="key outside"></span>outside, which is not learnt {dashed}</p>'
    )
    told = ""
    if drift:
        told = (
            '<p class="legend">Below: how far the prediction outside is from that of the untrained model, which '
            "mask_prior_weight holds it to.</p>"
        )
    charts = f"{chart}{drift_chart(drift, (figures[0][0], figures[-1][0]))}"
    return f'{legend}{told}<div class="scroll" role="region" aria-label="curves of masks" tabindex="0">{charts}</div>'


def series(figures: Figures, name: str) -> list[tuple[int, float]]:
    """Return one of the figures by step, where it was measured."""
    return [(step, value) for step, each in figures if (value := getattr(each, name)) is not None]


def tiles(figures: Figures) -> list[tuple[str, str]]:
    """Return the figures as they were at last, smoothed, for the head of the report."""
    found = []
    names = {"inside": "Loss inside masks", "outside": "Loss outside", "drift": "Drift outside"}
    for name, title in names.items():
        values = series(figures, name)
        if values:
            points = smoothed([(float(step), value) for step, value in values])
            found.append((title, f"{points[0][1]:.2g} → {points[-1][1]:.2g}"))
    return found


def share_bars(shares: Shares) -> str:
    """Return a bar for each image's share of weight, the lowest first; of many, some spread over all. "" for none."""
    if not shares:
        return ""
    ordered = sorted(shares, key=lambda share: (share[1], share[0]))
    shown = ordered
    if len(ordered) > MOST_BARS:
        shown = [ordered[round(i * (len(ordered) - 1) / (MOST_BARS - 1))] for i in range(MOST_BARS)]
    some = f", of which {len(shown)} are shown" if len(shown) < len(ordered) else ""
    mean = sum(value for _, value in shares) / len(shares)
    bars = "".join(
        f'<dt title="{escape(name)}">{escape(name)}</dt><dd class="track"><span style="width:{100 * share:.1f}%">'
        f"</span></dd><dd>{100 * share:.1f} %</dd>"
        for name, share in shown
    )
    return (
        f'<p class="legend">Share of the weight of a whole picture that each mask lets be learnt: mean '
        f'{100 * mean:.1f} % of {len(ordered)} images{some}.</p><dl class="bars">{bars}</dl>'
    )
