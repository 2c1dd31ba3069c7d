"""Image files in a folder: their names, and what their headers say without decoding a pixel."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import Image, features

from library.dataset.geometry import Size
from library.dataset.problems import FileError
from library.errors import DataError
from library.progress import progress
from library.whole_file import whole_file

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ORIENTATION_TAG = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
INFO_FILE = "metadata_cache.json"
JPEG_END = b"\xff\xd9"
JPEG_TAIL = 1 << 14  # bytes in which the end mark is looked for: cameras and editors write behind it


@dataclass(frozen=True)
class Header:
    """What a file's header says."""

    size: Size  # as seen: the EXIF orientation applied
    orientation: int  # EXIF, 1 to 8; 1 is upright
    has_alpha: bool


def image_extensions() -> tuple[str, ...]:
    """Return the extensions, in small letters, of the formats that this installation can read."""
    extensions: tuple[str, ...] = EXTENSIONS
    if features.check("avif"):
        extensions += (".avif",)
    if importlib.util.find_spec("pillow_jxl") is not None:
        importlib.import_module("pillow_jxl")  # importing it is what teaches Pillow the format
        extensions += (".jxl",)
    return extensions


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder, sorted by name; not those in folders within, nor hidden ones.

    Hidden are names that begin with a dot, like the ._cat.png that macOS puts beside a cat.png on foreign disks.

    Raises: DataError if there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder. Relative names start at {Path.cwd()}.")
    extensions = image_extensions()
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(extensions) and not entry.name.startswith(".") and entry.is_file()
        )
    return [folder / name for name in names]


def list_folders(folder: Path) -> list[Path]:
    """Return the folders within a folder, sorted by name; none of a folder that may not be listed."""
    names = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a link that leads where nobody may look
                names += [entry.name] if entry.is_dir() else []
    return [folder / name for name in sorted(names)]


def images_if_readable(folder: Path) -> list[Path]:
    """Return the image files in a folder that nobody has asked for; none where it may not be listed."""
    try:
        return list_images(folder)
    except (OSError, DataError):
        return []


def read_header(path: Path) -> Header:
    """Return the size, orientation and transparency of an image. Raises: FileError naming the file."""
    try:
        with Image.open(path) as image:
            if _needs_decoding(path, image.format):
                image.load()
            if image.mode == "F":
                reason = f"{path}: has floating-point pixels."
                raise FileError("unreadable", reason, "Save it with 8 or 16 bits a channel.")
            # The base class reads what is there; a PNG's own method would decode the picture to look for more.
            orientation = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
            if orientation not in range(1, 9):
                orientation = 1
            size = image.size[::-1] if orientation in QUARTER_TURNS else image.size
            return Header((size[0], size[1]), orientation, image.has_transparency_data)
    except Image.DecompressionBombError:
        most = f"{2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels"
        raise FileError("image-too-large", f"{path}: has more than {most}.", "Save it smaller.") from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        if (fingerprint(path) or [0, -1])[1] == 0:
            raise FileError(
                "file-empty", f"{path}: has no content, 0 bytes.", "Copy it again, or take it away."
            ) from None
        reason = "not an image" if "cannot identify" in str(error) else str(error)
        reason = f"{path}: cannot be read as an image ({reason})."
        raise FileError("unreadable", reason, "Save it again, or take it away.") from None


def _needs_decoding(path: Path, image_format: str | None) -> bool:
    """Return whether the header is not all: some programs write EXIF behind the pixels, and some files are cut short.

    Both are seen at the end of a file; whether a file without an end can be used is for the decoder to say.
    """
    with path.open("rb") as file:
        if image_format == "PNG":
            kinds = list(_png_chunks(file))
            return kinds[-1:] != [b"IEND"] or not {b"eXIf", b"iTXt", b"tEXt", b"zTXt"}.isdisjoint(_behind_pixels(kinds))
        if image_format in ("JPEG", "MPO"):
            file.seek(max(0, os.fstat(file.fileno()).st_size - JPEG_TAIL))
            return JPEG_END not in file.read()
    return False


def _behind_pixels(kinds: Sequence[bytes]) -> Sequence[bytes]:
    return kinds[kinds.index(b"IDAT") :] if b"IDAT" in kinds else ()


def _png_chunks(file: BinaryIO) -> Iterable[bytes]:
    file.seek(8)
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        yield kind
        file.seek(length + 4, os.SEEK_CUR)


def read_all(
    read: Callable[[Item], Result], items: Sequence[Item], *, label: str | None = None
) -> list[Result | DataError]:
    """Return read(item) of each item, or the DataError that it raised; several files are read at a time.

    Args:
        read: reads one.
        items: to read.
        label: of a progress bar; None shows none.
    """

    def attempt(item: Item) -> Result | DataError:
        try:
            return read(item)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(attempt, items)
        return list(results if label is None else progress(results, label=label, total=len(items)))


def load_info(folder: Path) -> dict[Path, Header]:
    """Return the headers kept by --cache_info, only of files that have not changed since."""
    try:
        content = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        entries = [(Path(name), entry) for name, entry in content.items() if "fingerprint" in entry]
        return {
            path: Header((entry["resolution"][0], entry["resolution"][1]), entry["orientation"], entry["has_alpha"])
            for path, entry in entries
            if entry["fingerprint"] == fingerprint(path)
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        log.warning("%s is damaged and is made anew", folder / INFO_FILE)
        return {}


def save_info(folder: Path, headers: Mapping[Path, Header], captions: Mapping[Path, str]) -> None:
    """Keep headers (and captions, which sd-scripts reads from there) in the folder's metadata_cache.json."""
    content: dict[str, dict[str, Any]] = {}
    for path, header in headers.items():
        values = asdict(header)
        values["resolution"] = values.pop("size")
        content[str(path)] = {"caption": captions.get(path, ""), **values, "fingerprint": fingerprint(path)}
    try:
        with whole_file(folder / INFO_FILE) as partial:
            partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        log.warning("--cache_info: %s cannot be written (%s)", folder / INFO_FILE, error.strerror or error)


def fingerprint(path: Path) -> list[int] | None:
    """Return what changes with a file's content, [time of the last change in ns, bytes], or None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_size]
