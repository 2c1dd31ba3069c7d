"""Write docs/options.md from the options' declarations: python tools/write_options_doc.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.options.command_line import CONFIG_FILE, OUTPUT_CONFIG  # noqa: E402
from library.options.declare import declared, default_text  # noqa: E402
from library.options.groups import GROUPS, all_declared  # noqa: E402
from library.options.reference import (  # noqa: E402
    GRANTED,
    IGNORED,
    IGNORED_BY_SCRIPT,
    OTHER_SCRIPTS,
    REFUSED,
    REFUSED_BY_SCRIPT,
    Elsewhere,
)
from library.options.values import Declared  # noqa: E402

TITLES = {"sd3": "SD3", "deepspeed": "DeepSpeed"}
DOCUMENT = ROOT / "docs" / "options.md"

INTRODUCTION = """# Options of the training scripts

*Written by `python tools/write_options_doc.py`; do not edit by hand.*

An option is given as `--name value` on the command line, or as `name = value` in the TOML file of `--config_file`,
where the names of sections do not matter. The command line beats the file, and the file beats the defaults. On the
command line a name may be shortened as long as only one option begins so. Flags take no value on the command line and
`true` or `false` in the file; lists are separated by spaces on the command line and stand in `[ ]` in the file.
Captions, masks and image sizes can be set more finely in a dataset config, which beats what is given here.
"""

REFUSED_HEADING = """## Refused options

sd-scripts has these options, and this project does not carry them out. Given with another value than their default,
they end the program before anything is loaded.

| option | why |
|---|---|"""

IGNORED_HEADING = """## Ignored options

These are accepted with a warning.

| option | why |
|---|---|"""

BY_SCRIPT_HEADING = """## Options that a script cannot carry out

| script | option | what comes of it |
|---|---|---|"""

GRANTED_HEADING = """## Options that are always on

What these ask for is always done. They are accepted without a word.

| option | what is always done |
|---|---|"""

OTHER_SCRIPTS_HEADING = """## Options of other scripts

sd-scripts has these options for other scripts. They are accepted with a warning, so that one config file can serve
several scripts.

| option | script |
|---|---|"""


def render() -> str:
    """Return the whole document in Markdown."""
    parts = [INTRODUCTION, _table("command line", "Where values come from.", (CONFIG_FILE, OUTPUT_CONFIG))]
    for title, group in GROUPS.items():
        parts.append(_table(title, (group.__doc__ or "").strip(), declared(group)))
    parts.append("\n".join([REFUSED_HEADING, *map(_reason_row, REFUSED), ""]))
    parts.append("\n".join([IGNORED_HEADING, *map(_reason_row, IGNORED), ""]))
    parts.append("\n".join([BY_SCRIPT_HEADING, *_rows_by_script(), ""]))
    parts.append("\n".join([GRANTED_HEADING, *map(_reason_row, GRANTED), ""]))
    elsewhere = {name: scripts for name, (scripts, _) in OTHER_SCRIPTS.items() if name not in all_declared()}
    others = [f"| `--{name}` | {', '.join(scripts)} |" for name, scripts in elsewhere.items()]
    parts.append("\n".join([OTHER_SCRIPTS_HEADING, *others, ""]))
    return "\n".join(parts)


def _table(title: str, text: str, options: Iterable[Declared]) -> str:
    heading = [
        f"## {TITLES.get(title, title.capitalize())}",
        "",
        text,
        "",
        "| option | type | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*heading, *map(_row, options), ""])


def _row(each: Declared) -> str:
    kind = " ".join(f"`{choice}`" for choice in each.choices) if each.choices else each.type_name
    limits = f" Must be {each.bounds.text()}." if each.bounds.text() else ""
    if each.default is None or each.default == "":
        default = ""
    else:
        default = f"`{str(each.default).lower() if each.element is bool else default_text(each)}`"
    scripts = OTHER_SCRIPTS.get(each.name, ((),))[0]  # that alone have this option
    only = f" Only {' and '.join(scripts)}." if scripts else ""
    return f"| `{each.flag}` | {kind} | {default} | {_escaped(each.help + limits + only)} |"


def _rows_by_script() -> Iterable[str]:
    for table, outcome in ((REFUSED_BY_SCRIPT, "refused"), (IGNORED_BY_SCRIPT, "ignored with a warning")):
        for script, reasons in table.items():
            for name, reason in reasons.items():
                yield f"| {script} | `--{name}` | {outcome}: {_escaped(reason)} |"


def _reason_row(each: Elsewhere) -> str:
    return f"| `--{each.name}` | {_escaped(each.reason)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*")


def main() -> int:
    """Write the document and return the exit code."""
    DOCUMENT.write_text(render(), encoding="utf-8")
    print(f"{DOCUMENT.relative_to(ROOT)} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
