"""Captions with weights, as AUTOMATIC1111's web UI writes them: (word), [word], (word:1.3)."""

from __future__ import annotations

import re

ROUND, SQUARE = 1.1, 1 / 1.1  # what one pair of brackets multiplies by
PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|.)",
    re.DOTALL,
)


def parse(caption: str) -> list[tuple[str, float]]:
    """Return the caption's text in pieces with their weights; neighbours of one weight are one piece.

    "a (big:1.5) [old] tree" -> [("a ", 1.0), ("big", 1.5), (" ", 1.0), ("old", 0.909...), (" tree", 1.0)]. A
    backslash makes a bracket plain text, a bracket that is never closed reaches to the end, a closing one that was
    never opened is plain text.
    """
    pieces: list[tuple[str, float]] = []
    rounds: list[int] = []  # where each open bracket's text begins in pieces
    squares: list[int] = []

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in PIECE.finditer(caption):
        kind = match.lastgroup
        if kind == "open":
            (rounds if match["open"] == "(" else squares).append(len(pieces))
        elif kind == "weight" and rounds:
            multiply(rounds.pop(), float(match["weight"]))
        elif kind == "close" and match["close"] == ")" and rounds:
            multiply(rounds.pop(), ROUND)
        elif kind == "close" and match["close"] == "]" and squares:
            multiply(squares.pop(), SQUARE)
        else:
            pieces.append((match["escaped"] or match[0], 1.0))
    for start in rounds:
        multiply(start, ROUND)
    for start in squares:
        multiply(start, SQUARE)
    return _merged(pieces)


def _merged(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return the pieces with neighbours of equal weight joined, so that they are tokenised as one text."""
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged
