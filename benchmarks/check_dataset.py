"""Wall time of tools/check_dataset.py over 1,000 images, from the command to its last line, when only headers are read.

Once for JPEGs with captions and a mask image each (2,000 headers), once for RGBA pictures with alpha masks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measuring import ROOT, Figure, conclude, load, make_parser, timed
from pictures import dataset_config, write_pictures

MAX_S = 5.0
LABELS = {"jpg": "JPEG + mask PNG", "rgba": "RGBA PNG"}


def check(dataset: Path) -> None:
    """Run the command over a dataset config; its exit code must say that all is well."""
    command = [sys.executable, "tools/check_dataset.py", "--dataset_config", str(dataset)]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=1000, help="pictures (default 1000)")
    parser.add_argument("--side", type=int, default=1024, help="their sides in pixels (default 1024)")
    parser.add_argument("--runs", type=int, default=7, help="runs that count (default 7)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.count, arguments.side, arguments.runs = 3, 128, 1
    warm_up = 0 if arguments.quick else 1
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        datasets = {}
        for kind, label in LABELS.items():
            pictures = write_pictures(Path(folder) / kind, arguments.count, arguments.side, kind)
            datasets[label] = dataset_config(pictures, arguments.side, is_masked=True, kind=kind)
        load_before = load()
        for label, dataset in datasets.items():
            seconds = timed(lambda dataset=dataset: check(dataset), runs=arguments.runs, warm_up=warm_up)
            figures.append(Figure(f"check {arguments.count} {label}", "s", seconds, warm_up, at_most=MAX_S))
    conclude(arguments, figures, load_before)


if __name__ == "__main__":
    main()
