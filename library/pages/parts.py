"""Parts of a page: the page itself, tables, and pictures that it holds within."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from library.pages.style import STYLE


def document(title: str, header: str, sections: Iterable[tuple[str, str]], style: str = STYLE) -> str:
    """Return a whole page.

    Args:
        title: of the window, as text.
        header: HTML that stands on top.
        sections: heading as text and content as HTML of each; those without content are left out.
        style: the style sheet.
    """
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing may be fetched, whatever a caption or an option holds
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><header>{header}</header><main>{body}</main></body></html>\n"
    )


def heading(kind: str, title: str, tiles: Iterable[tuple[str, str]]) -> str:
    """Return the top of a page: what it is, its title, and figures by name."""
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return f'<p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1><dl class="tiles">{listed}</dl>'


def picture(data: bytes, kind: str, size: tuple[int, int], alt: str) -> str:
    """Return an img element that holds a picture itself.

    Args:
        data: the file.
        kind: "png" or "webp".
        size: width and height, pixels.
        alt: what it shows, in words.
    """
    encoded = base64.b64encode(data).decode("ascii")
    return (
        f'<img src="data:image/{kind};base64,{encoded}" width="{size[0]}" height="{size[1]}" alt="{escape(alt)}" '
        'loading="lazy">'
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an HTML table; the first row's keys are its columns; numbers stand to the right."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col"{_side(value)}>{escape(str(name))}</th>' for name, value in rows[0].items())
    lines = "".join("<tr>" + "".join(_cell(row.get(name)) for name in rows[0]) + "</tr>" for row in rows)
    return scrolled(f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>", "table")


def _cell(value: Any) -> str:
    return f"<td{_side(value)}>{escape('' if value is None else str(value))}</td>"


def _side(value: Any) -> str:
    """Return the attribute that puts a number to the right."""
    return ' class="number"' if isinstance(value, int | float) and not isinstance(value, bool) else ""


def pairs(values: Mapping[str, Any]) -> str:
    """Return values by name as an HTML table, as a user would write them."""
    if not values:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_plain(value))}</td></tr>'
        for name, value in values.items()
    )
    return scrolled(f'<table class="pairs"><tbody>{rows}</tbody></table>', "table")


def scrolled(content: str, label: str) -> str:
    """Return content that scrolls sideways in a narrow window, with the keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{content}</div>'


def _plain(value: Any) -> str:
    """Return a value as a user would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
