"""Say what training would see of a dataset, and what is wrong with it, without loading a model.

python tools/check_dataset.py --dataset_config dataset.toml [--json FILE] [--masks DIR] [--contact_sheet FILE.png]

It takes the options of training; a training command line or its --config_file can be given as it is. The exit code is
0 if the dataset can be trained on, 1 if there are errors in it, 2 if the options or the config cannot be used.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.cli import set_up_logging  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.options import GROUPS, CommandLine, read_command_line  # noqa: E402
from library.options.declare import Parser  # noqa: E402

if TYPE_CHECKING:
    from library.dataset.problems import Problem
    from library.dataset.scan import Sample

GOOD, HAS_ERRORS, WRONG_USE = 0, 1, 2  # exit codes
SHOWN = ("dataset", "captions", "masks", "validation")  # groups in --help
BUCKET_STEP_MULTIPLE = 32  # of SDXL and SD3: which model it is for is not known
COARSE_STEP_MULTIPLE = 64  # of SD 1.x and 2.x
WRITTEN = ("json", "masks", "contact_sheet", "html")  # flags that name what is written
SEVERITIES = ("error", "warning", "note")
MOST_WARNINGS = 20  # of a kind that are told one by one


def add_own(parser: Parser) -> None:
    """Add the command's own flags."""
    section = parser.add_argument_group("findings")
    section.add_argument("--full", action="store_true", help="Look at all pixels too, as each of the following does.")
    section.add_argument("--html", metavar="FILE", help="Write a page with all findings and pictures of them.")
    section.add_argument("--json", metavar="FILE", help="Write all findings to this file.")
    section.add_argument("--masks", metavar="DIR", help="Write the weights at latent size there, float32 .npy (h, w).")
    section.add_argument("--contact_sheet", metavar="FILE.png", help="Draw the pictures with their masks over them.")


def check(read: CommandLine) -> int:
    """Print the findings and write what is asked for; return the exit code.

    Raises: UserError if the options or the config cannot be used, or a file cannot be written.
    """
    from library.dataset import config, own_class, summary
    from library.dataset.problems import Problem
    from library.dataset.scan import check_masked_loss
    from library.errors import OptionError
    from library.inspection import decoding, findings_file, page
    from library.inspection.inspect import inspect, once
    from library.inspection.scene import Scene

    options, wanted = read.options, {name: Path(value) for name, value in read.own.items() if name in WRITTEN and value}
    groups = (options.dataset, options.captions, options.masks, options.validation)
    configs = config.load(*groups, bucket_step_multiple=BUCKET_STEP_MULTIPLE)
    found = own_class.scan_any(configs, options.dataset, options.model.max_token_length)
    samples = found.samples + found.validation
    is_full = bool(wanted or read.own.get("full"))
    looked = decoding.look_at(samples, weights=wanted.get("masks"), thumbnails="html" in wanted) if is_full else []
    problems = inspect(configs, found, looked)
    try:
        check_masked_loss(options.masks.masked_loss, samples)
    except OptionError as error:
        problems.append(Problem("error", configs[0].subsets[0].source, str(error), code="masked-loss-idle"))
    if "contact_sheet" in wanted:
        known = {problem.path for problem in problems if problem.severity == "error"}
        problems += [each for each in draw_sheet(samples, wanted["contact_sheet"]) if each.path not in known]
    problems = once(problems)
    if "html" in wanted:
        scene = Scene(configs, found, looked)
        title = page.title_of(scene, options.dataset.dataset_config)
        page.write_page(wanted["html"], title, scene, problems)
    if "json" in wanted:
        findings_file.write_json(findings_file.as_json(found, looked, problems), wanted["json"])

    print(*summary.lines(configs, found.samples, found.validation), sep="\n")
    for number, each in enumerate(configs):
        if each.enable_bucket and each.bucket_reso_steps % COARSE_STEP_MULTIPLE:
            step = f"bucket_reso_steps {each.bucket_reso_steps}"
            print(
                f"dataset {number}: {step} fits SDXL and SD3; SD 1.x and 2.x take multiples of {COARSE_STEP_MULTIPLE}"
            )
    print(summary.mask_line(samples, mean_weight=findings_file.mean_weight(looked)))
    if line := findings_file.coverage_line(looked):
        print(line)
    tell(problems)
    if not is_full:
        print("only names, headers and settings were looked at: --full, or --html FILE, looks at the pixels too")
    for name, path in wanted.items():
        print(f"{name.replace('_', ' ')}: {path}")
    return HAS_ERRORS if any(problem.severity == "error" for problem in problems) else GOOD


def tell(problems: Sequence[Problem]) -> None:
    """Print all problems, the worst first; of many warnings of a kind some, of notes a line for each kind."""
    from library.dataset.problems import joint_messages

    counts = {severity: sum(each.severity == severity for each in problems) for severity in SEVERITIES}
    more = f", {counts['note']} notes" if counts["note"] else ""
    print(f"problems: {counts['error']} errors, {counts['warning']} warnings{more}")
    told: Counter[str] = Counter()
    for problem in sorted(problems, key=lambda each: SEVERITIES.index(each.severity)):
        told[problem.code] += problem.severity == "warning"
        if problem.severity != "note" and told[problem.code] <= MOST_WARNINGS:
            print(f"  {problem.severity}: {problem.message} [{problem.code}]")
    for code, count in told.items():
        if count > MOST_WARNINGS:
            print(f"  warning: {count - MOST_WARNINGS} more of this kind, which --json lists [{code}]")
    notes_by_code: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.severity == "note":
            notes_by_code.setdefault(problem.code, []).append(problem)
    for code, alike in notes_by_code.items():
        for message in joint_messages(alike):
            print(f"  note: {message} [{code}]")


def draw_sheet(samples: Sequence[Sample], path: Path) -> list[Problem]:
    """Write the contact sheet; return an error for each image that could not be drawn."""
    from library.dataset import contact_sheet
    from library.dataset.problems import Problem

    cells = contact_sheet.cells(samples)
    contact_sheet.assemble([cell for cell in cells.values() if not isinstance(cell, UserError)], len(samples), path)
    broken = [(sample.path, str(cell)) for sample, cell in cells.items() if isinstance(cell, UserError)]
    return [Problem("error", path, message, code="image-unreadable") for path, message in broken]


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    try:
        read = read_command_line(
            sys.argv[1:] if argv is None else argv,
            prog="check_dataset.py",
            description="Say what training would see of a dataset, and what is wrong with it.",
            shown={title: GROUPS[title] for title in SHOWN},
            add_own=add_own,
        )
        set_up_logging(read.options.logging)
        return check(read)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
