"""What a pass over the pictures is summed up to."""

from __future__ import annotations

from collections.abc import Sequence

from library.mask_making.making import Fault, Outcome

MOST_NAMES, MOST_DOUBTS = 10, 20  # of a line, and lines
FAULTS: dict[Fault, str] = {
    "empty": "nothing of them would be learnt",
    "full": "nothing of them is masked out",
    "faint": "nothing of them counts more than half",
}


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the closing lines: how many masks of each kind, and the names of those to look at."""
    numbers = {state: sum(each.state == state for each in outcomes) for state in ("made", "kept", "failed")}
    faulty = {fault: [each.job.name for each in outcomes if each.fault == fault] for fault in FAULTS}
    counts = [f"{numbers['made']} made", f"{numbers['kept']} kept", f"{numbers['failed']} not made"]
    counts += [f"{len(faulty[fault])} {fault}" for fault in ("empty", "full")]
    said = [f"masks: {', '.join(counts)}"]
    said += [f"  {fault}, {meaning}: {_named(faulty[fault])}" for fault, meaning in FAULTS.items() if faulty[fault]]
    doubts: dict[str, list[str]] = {}
    for each in sorted(outcomes, key=lambda each: each.job.name):
        if each.doubt:
            doubts.setdefault(each.doubt, []).append(each.job.name)
    said += [f"  {_named(names)}: {doubt}" for doubt, names in list(doubts.items())[:MOST_DOUBTS]]
    unsaid = sum(len(names) for names in list(doubts.values())[MOST_DOUBTS:])
    if unsaid:
        said.append(f"  {unsaid} more are doubtful; --sheet shows them")
    if numbers["kept"]:
        said.append("  kept ones are not looked at; --overwrite makes them anew")
    return said


def is_suspicious(outcome: Outcome) -> bool:
    """Return whether somebody should look at a mask."""
    return bool(outcome.fault or outcome.doubt)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(sorted(names)[:MOST_NAMES]) + more
