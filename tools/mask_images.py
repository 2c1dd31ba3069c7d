"""Make a mask for each picture in a folder and all folders within it.

python tools/mask_images.py PICTURES [MASKS] --model u2netp --grow 4 --sheet sheet.png

The masks are 8-bit grey PNG files, white where the picture is learnt, of the picture's size, and lie in MASKS as the
pictures lie in PICTURES, so that conditioning_data_dir = "MASKS" of a subset finds them. The exit code is 0 if each
picture has its mask, 1 if some could not have one, 2 if the options cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.cli import set_up_logging  # noqa: E402
from library.errors import OptionError, UserError, did_you_mean  # noqa: E402
from library.mask_making.options import FinishOptions, SourceOptions, WriteOptions  # noqa: E402
from library.options.declare import build, declared, parser  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from library.options.values import convert  # noqa: E402

GOOD, SOME_FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130  # exit codes
GROUPS = {"source": SourceOptions, "finishing": FinishOptions, "writing": WriteOptions}
ENDING = "_mask"  # of the folder of masks, if it is not named
DESCRIPTION = """Make a mask for each picture in a folder and all folders within it: an 8-bit grey PNG of the picture's
name and size, white where the picture is learnt.

Exactly one of --from_alpha, --from_color, --key_border, --threshold, --boxes and --model says what masks are
made from."""
EXAMPLES = """
examples:
  cut-outs               mask_images.py pictures masks --from_alpha
  a flat background      mask_images.py pictures masks --key_border --connected --shrink 1
  photos                 mask_images.py pictures masks --model u2netp --grow 4 --sheet sheet.png
  a watermark as well    mask_images.py pictures masks --boxes watermark.csv --combine intersect
                         where watermark.csv says, for the corner at the lower right: *,-200,-60,200,60
"""


@dataclass(frozen=True)
class Command:
    """What the command line says."""

    image_dir: Path
    mask_dir: Path
    source: SourceOptions
    finish: FinishOptions
    write: WriteOptions


def read(argv: Sequence[str]) -> Command:
    """Return what the arguments say. Raises: OptionError."""
    import argparse

    made = parser("mask_images.py", DESCRIPTION, GROUPS)
    made.usage = "%(prog)s PICTURES [MASKS] --SOURCE [options]"
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.epilog = EXAMPLES
    made.add_argument("image_dir", metavar="PICTURES", help="Folder of pictures.")
    made.add_argument("mask_dir", metavar="MASKS", nargs="?", help=f"Folder for masks. Unset: PICTURES{ENDING}.")
    known = {each.name: each for group in GROUPS.values() for each in declared(group)}
    namespace, unknown = made.parse_known_args(list(argv))
    for argument in unknown:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
            raise OptionError(
                f"there is no option {flag}.{did_you_mean(flag, [f'--{name}' for name in known])} See --help."
            )
        raise OptionError(f"{argument!r} belongs to no option. Put names with spaces in quotes.")
    given = vars(namespace)
    pictures = Path(given.pop("image_dir"))
    beside = pictures.resolve() if pictures.name == ".." else pictures.absolute()
    masks = given.pop("mask_dir")
    values = {name: convert(known[name], raw, known[name].flag) for name, raw in given.items()}
    return Command(
        image_dir=pictures,
        mask_dir=Path(masks) if masks else Path(f"{beside}{ENDING}"),
        source=build(SourceOptions, values),
        finish=build(FinishOptions, values),
        write=build(WriteOptions, values),
    )


def check_sheet(path: Path) -> None:
    """Find out, before the work begins, whether the sheet can be written. Raises: OptionError."""
    from library.whole_file import check_writable

    try:
        check_writable(path.absolute().parent)
    except OSError as error:
        raise OptionError(f"--sheet {path}: cannot be written ({error.strerror or error}).") from None


def work(command: Command) -> int:
    """Make the masks; return the exit code. Raises: UserError if none can be made."""
    from library.mask_making import making, review, sources, summary
    from library.mask_making.finishing import Finish

    write, how = command.write, command.finish
    old = Path(write.combine_with) if write.combine_with else None
    jobs, errors = making.find_jobs(command.image_dir, command.mask_dir, old)
    if not jobs and not errors:
        raise OptionError(f"{command.image_dir}: has no picture in it, nor in folders within it.")
    if write.sheet:
        check_sheet(Path(write.sheet))
    source = sources.source_of(command.source, [job.name for job in jobs])
    finish = Finish(**{each.name: getattr(how, each.name) for each in declared(FinishOptions)})
    keeps = making.keeps(jobs, combine=write.combine, overwrite=write.overwrite)
    if write.dry_run:
        wanted = [job for job in jobs if not (keeps and making.is_there(job))]
        print(*(f"{job.name} -> {job.mask}" for job in wanted), sep="\n")
        print(f"masks: {len(wanted)} to be made, {len(jobs) - len(wanted)} to be kept")
        outcomes = []
    else:
        outcomes = list(
            making.make_all(
                jobs, source, finish, combine=write.combine, keep=keeps, batch_size=command.source.batch_size or 1
            )
        )
        print(*summary.lines(outcomes), sep="\n")
    messages = [str(error) for error in errors] + [each.error for each in outcomes if each.error]
    if write.sheet:
        messages += review.draw(outcomes, Path(write.sheet))
        print(f"sheet: {write.sheet}")
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    return SOME_FAILED if messages else GOOD


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    try:
        command = read(sys.argv[1:] if argv is None else argv)
        set_up_logging(LoggingOptions())
        return work(command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("interrupted; run the command again to go on", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
