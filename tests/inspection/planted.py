"""A dataset with a fault of every kind in it, and what must be found: (code, name of the file or folder)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = (160, 128)  # width, height
ORIENTATION = 0x0112
GENERATOR = 7


class Folder:
    """A folder of pictures with masks and captions, all of them right until something is planted."""

    def __init__(self, root: Path, name: str) -> None:
        self.images, self.masks = root / name, root / f"{name}-m"
        self.images.mkdir(parents=True)
        self.masks.mkdir()

    def good(self, stem: str, size: tuple[int, int] = SIZE) -> None:
        """Add a picture with a mask and a caption."""
        scene(stem, size).save(self.images / f"{stem}.png")
        ellipse(size).save(self.masks / f"{stem}.png")
        self.caption(stem, f"photo of a {stem}")

    def caption(self, stem: str, text: str) -> None:
        (self.images / f"{stem}.txt").write_text(text, encoding="utf-8")

    def mask(self, stem: str, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(self.masks / f"{stem}.png")


def scene(name: str, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a picture with some detail, another one for each name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC))


def ellipse(size: tuple[int, int] = SIZE, *, inverted: bool = False) -> Image.Image:
    mask = np.zeros((size[1], size[0]), np.uint8)
    cv2.ellipse(mask, (size[0] // 2, size[1] // 2), (size[0] // 3, size[1] // 3), 0, 0, 360, 255, -1)
    return Image.fromarray(255 - mask if inverted else mask)


def lines(thickness: int) -> np.ndarray:
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    for y in range(20, 120, 30):
        cv2.line(mask, (10, y), (150, y), 255, thickness)
    return mask


def deep_png(path: Path, grey: bool) -> None:
    """Write a PNG with 16 bits a channel."""
    width, height = SIZE
    ramp = (np.linspace(0, 65535, width)[None, :, None] * np.ones((height, 1, 1 if grey else 3))).astype(">u2")
    if not grey:
        ramp[height // 3 :, :, 1] //= 3
        ramp[: height // 2, width // 3 :, 2] //= 5
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 0 if grey else 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def plant_pictures(root: Path) -> dict[str, str]:
    """Plant faults of picture files in a folder "pictures"; return what is to be found, by file: its code."""
    f = Folder(root, "pictures")
    for stem in ("cut", "huge", "moving", "deep", "print", "indexed", "turned", "tiny", "strip", "twice", "again"):
        f.good(stem)
    (f.images / "cut.png").write_bytes((f.images / "twice.png").read_bytes()[:-4000])
    (f.images / "nothing.png").touch()
    ellipse().save(f.masks / "nothing.png")
    Image.new("1", (15000, 13000)).save(f.images / "huge.png")
    frames = [scene(f"moving {number}") for number in range(3)]
    (f.images / "moving.png").unlink()
    frames[0].save(f.images / "moving.webp", save_all=True, append_images=frames[1:])
    deep_png(f.images / "deep.png", grey=False)
    (f.images / "print.png").unlink()
    scene("print").convert("CMYK").save(f.images / "print.jpg")
    scene("indexed").quantize(64).save(f.images / "indexed.png", transparency=0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    scene("turned", SIZE[::-1]).save(f.images / "turned.png", exif=exif)
    scene("tiny", (32, 24)).save(f.images / "tiny.png")
    ellipse((32, 24)).save(f.masks / "tiny.png")
    scene("strip", (640, 120)).save(f.images / "strip.png")
    ellipse((640, 120)).save(f.masks / "strip.png")
    (f.images / "again.png").write_bytes((f.images / "twice.png").read_bytes())
    f.good("similar")
    scene("twice").resize((150, 120)).save(f.images / "similar.png")
    ellipse((150, 120)).save(f.masks / "similar.png")
    f.good("stem")
    (f.images / "stem.jpg").write_bytes(b"")
    scene("another stem").save(f.images / "stem.jpg")
    (f.images / "Thumbs.db").write_bytes(b"\0")
    scene("scan").save(f.images / "scan.tif")
    (f.images / "more").mkdir()
    scene("inner").save(f.images / "more" / "inner.png")
    return {
        "cut.png": "image-unreadable",
        "nothing.png": "file-empty",
        "huge.png": "image-too-large",
        "moving.webp": "image-animated",
        "deep.png": "image-16-bit",
        "print.jpg": "image-cmyk",
        "indexed.png": "image-palette",
        "turned.png": "image-turned",
        "tiny.png": "image-enlarged",
        "strip.png": "image-aspect",
        "twice.png": "image-duplicate",
        "similar.png": "image-similar",
        "stem.png": "image-same-stem",
        "Thumbs.db": "file-hidden",
        "scan.tif": "file-format",
        "pictures": "folder-inner",
    }


def plant_masks(root: Path) -> dict[str, str]:
    """Plant faults of masks in a folder "masked"; return what is to be found, by file: its code."""
    f = Folder(root, "masked")
    height, width = SIZE[1], SIZE[0]
    stems = ("absent", "bird", "Case", "square", "broken", "film", "fine", "jpeg", "black", "speck", "white")
    stems += ("inverted", "levels", "clear", "colour", "copy", "thin", "noisy", "aside", "lying")
    for stem in stems:
        f.good(stem)
    (f.masks / "absent.png").unlink()
    f.masks.joinpath("bird.png").rename(f.masks / "bird_mask.png")
    f.masks.joinpath("Case.png").rename(f.masks / "case.png")
    ellipse().save(f.masks / "nobody at all.png")
    ellipse((128, 128)).save(f.masks / "square.png")
    (f.masks / "broken.png").write_bytes(b"this is no picture")
    (f.masks / "film.png").unlink()
    still = [ellipse(), ellipse(inverted=True)]
    still[0].save(f.masks / "film.webp", save_all=True, append_images=still[1:], lossless=True)
    deep_png(f.masks / "fine.png", grey=True)
    (f.masks / "jpeg.png").unlink()
    ellipse().save(f.masks / "jpeg.jpg", quality=40)
    f.mask("black", np.zeros((height, width), np.uint8))
    f.mask("speck", np.pad(np.full((8, 8), 255, np.uint8), ((60, 60), (76, 76))))
    f.mask("white", np.full((height, width), 255, np.uint8))
    ellipse(inverted=True).save(f.masks / "inverted.png")
    f.mask("levels", np.asarray(ellipse()) // 255)
    transparent = np.dstack([np.full((height, width, 3), 255, np.uint8), np.asarray(ellipse())])
    f.mask("clear", transparent)
    coloured = np.dstack([np.asarray(ellipse()), 255 - np.asarray(ellipse()), np.zeros((height, width), np.uint8)])
    f.mask("colour", coloured)
    (f.masks / "copy.png").write_bytes((f.images / "copy.png").read_bytes())
    f.mask("thin", lines(2))
    dots = np.asarray(ellipse()).copy()
    dots[4:20:4, 4:156:4] = 255
    f.mask("noisy", dots)
    scene("aside", (200, 128)).save(f.images / "aside.png")
    f.mask("aside", np.pad(np.full((128, 60), 255, np.uint8), ((0, 0), (0, 140))))
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    scene("lying").save(f.images / "lying.png", exif=exif)
    return {
        "absent.png": "mask-missing",
        "bird.png": "mask-near-miss",
        "Case.png": "mask-case",
        "nobody at all.png": "mask-surplus",
        "square.png": "mask-shape",
        "broken.png": "mask-unreadable",
        "film.webp": "mask-animated",
        "fine.png": "mask-16-bit",
        "jpeg.jpg": "mask-jpeg",
        "black.png": "mask-empty",
        "speck.png": "mask-nearly-empty",
        "white.png": "mask-full",
        "inverted.png": "mask-inverted",
        "levels.png": "mask-levels",
        "clear.png": "mask-in-alpha",
        "colour.png": "mask-coloured",
        "copy.png": "mask-is-picture",
        "thin.png": "mask-thin",
        "noisy.png": "mask-speckled",
        "aside.png": "mask-cut-away",
        "lying.png": "mask-orientation",
    }


def plant_cutouts(root: Path) -> dict[str, str]:
    """Plant faults of transparency in folders "cutouts" and "opaque"; return what is to be found."""
    f, g = Folder(root, "cutouts"), Folder(root, "unused")
    for stem, alpha in {
        "solid": np.full(SIZE[::-1], 255, np.uint8),
        "ghost": np.zeros(SIZE[::-1], np.uint8),
        "backdrop": np.asarray(ellipse()),
    }.items():
        f.caption(stem, f"photo of a {stem}")
        colours = np.asarray(scene(stem)).copy()
        if stem == "backdrop":
            colours ^= np.random.default_rng(GENERATOR).integers(0, 64, colours.shape, dtype=np.uint8)
        Image.fromarray(np.dstack([colours, alpha])).save(f.images / f"{stem}.png")
    g.caption("hole", "photo of a hole")
    Image.fromarray(np.dstack([np.asarray(scene("hole")), np.asarray(ellipse())])).save(g.images / "hole.png")
    return {
        "solid.png": "alpha-opaque",
        "ghost.png": "alpha-transparent",
        "backdrop.png": "alpha-hidden-picture",
        "hole.png": "alpha-unused",
    }


def plant_captions(root: Path) -> dict[str, str]:
    """Plant faults of captions in folders "words" and "tags"; return what is to be found."""
    f = Folder(root, "words")
    for stem in ("mute", "latin", "mojibake", "marked", "space"):
        f.good(stem)
    (f.images / "mute.txt").write_bytes(b"")
    (f.images / "latin.txt").write_bytes("für".encode("latin-1"))
    f.caption("mojibake", "fÃ¼r Elise")
    f.caption("marked", "a cat, watermark, english text")
    f.caption("space", " \n")
    g = Folder(root, "untold")
    g.good("quiet")
    (g.images / "quiet.txt").unlink()
    h = Folder(root, "tags")
    h.good("tagged")
    (h.images / "tagged.txt").rename(h.images / "tagged.caption")
    return {
        "mute.png": "caption-empty",
        "latin.png": "caption-encoding",
        "mojibake.png": "caption-garbled",
        "marked.png": "caption-names-masked",
        "space.png": "caption-empty",
        "untold": "caption-missing",
        "tags": "caption-extension",
    }


def plant_folders(root: Path) -> dict[str, str]:
    """Plant faults of folders and settings; return what is to be found, by folder: its code."""
    (root / "parent" / "10_dog").mkdir(parents=True)
    scene("parent").save(root / "parent" / "10_dog" / "dog.png")
    own = Folder(root, "self")
    own.good("narcissus")
    loose = Folder(root, "loose")
    loose.good("loose")
    loose.masks.rename(root / "loose_mask")
    repeats = Folder(root, "12_wolf")
    repeats.good("wolf")
    labels = Folder(root, "labels")
    labels.good("labelled")
    labelled = np.zeros(SIZE[::-1], np.uint8)
    labelled[:, 60:] = 1
    labelled[:, 120:] = 7
    labels.mask("labelled", labelled)
    reg = Folder(root, "reg")
    reg.good("known")
    reg.images.joinpath("known.png").write_bytes((root / "words" / "marked.png").read_bytes())
    return {
        "parent": "folder-level",
        "self": "mask-folder-of-images",
        "loose_mask": "masks-unused",
        "12_wolf": "folder-repeats",
        "labelled.png": "label-unlisted",
        "labels-m": "label-unused",
        "known.png": "reg-duplicate",
        "nowhere": "mask-folder-absent",
    }


SETTINGS: dict[str, Callable[[Path], str]] = {
    "pictures": lambda root: f"conditioning_data_dir = {str(root / 'pictures-m')!r}",
    "masked": lambda root: f"conditioning_data_dir = {str(root / 'masked-m')!r}",
    "cutouts": lambda root: "alpha_mask = true",
    "unused": lambda root: "mask_dilate = 3",
    "words": lambda root: f"conditioning_data_dir = {str(root / 'words-m')!r}\nmask_drop_tags = ['logo']",
    "untold": lambda root: f"conditioning_data_dir = {str(root / 'untold-m')!r}\nmask_weight_min = 1.0",
    "tags": lambda root: f"conditioning_data_dir = {str(root / 'nowhere')!r}",
    "parent": lambda root: "",
    "self": lambda root: f"conditioning_data_dir = {str(root / 'self')!r}",
    "loose": lambda root: "placement_rotate = 20.0",
    "12_wolf": lambda root: f"conditioning_data_dir = {str(root / '12_wolf-m')!r}",
    "labels": lambda root: f"conditioning_data_dir = {str(root / 'labels-m')!r}\nmask_labels = {{ 1 = 1.0, 9 = 0.5 }}",
    "reg": lambda root: "is_reg = true",
}
OF_SETTINGS = {
    ("mask-settings-idle", "unused"),
    ("drop-tags-unused", "words"),
    ("mask-settings-contradict", "untold"),
    ("placement-idle", "loose"),
    ("bucket-short", "pictures"),
}


def plant(root: Path) -> set[tuple[str, str]]:
    """Write the dataset and its config, dataset.toml; return all that is to be found."""
    by_file = {
        **plant_pictures(root),
        **plant_masks(root),
        **plant_cutouts(root),
        **plant_captions(root),
        **plant_folders(root),
    }
    text = "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = [160, 128]\nenable_bucket = true\n"
    text += "min_bucket_reso = 64\nmax_bucket_reso = 192\nbatch_size = 3\n"
    for name, settings in SETTINGS.items():
        text += f"[[datasets.subsets]]\nimage_dir = {str(root / name)!r}\n{settings(root)}\n"
    (root / "dataset.toml").write_text(text, encoding="utf-8")
    return {(code, name) for name, code in by_file.items()} | OF_SETTINGS
