"""Masks by a segmentation model: how a picture is prepared for it, what runs it, and what its answer means."""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from library.dataset.geometry import Size
from library.errors import CheckpointError, OptionError
from library.mask_making.model_files import NetworkFile, read_network_file
from library.mask_making.pictures import Drawn, Picture, Source

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Run = Callable[[Floats], Floats]  # (B, 3, H, W) or (B, H, W, 3), as the file has it -> (B, H, W)

PAPER = 255  # what a model sees where a picture is transparent: white
ANIME_INPUT = "img"  # of no other model that is known here
UNSURE = (0.25, 0.75)  # answers between these say neither yes nor no
MOSTLY = 0.5  # of what is not masked out
FATAL = 1  # OpenCV's level of messages that leaves out warnings, and errors that it raises as well
FAINT = 0.1  # an answer that is nowhere stronger says that nothing was found


@dataclass(frozen=True)
class Preset:
    """What a kind of model was trained to see, and how its answer is read."""

    size: tuple[int, int]  # width, height, where the file leaves it open
    mean: tuple[float, float, float]  # taken from each of red, green and blue in 0..1
    std: tuple[float, float, float]  # they are divided by it then
    by_brightest: bool  # 1 is the picture's brightest value, not 255
    stretch: bool  # the answer's range is stretched to 0..1
    is_whole: bool = False  # pictures keep their proportions, and black fills the rest of what the model sees


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        # github.com/xuebinqin/U-2-Net: ToTensorLab of data_loader.py, and normPRED of u2net_test.py
        "u2net": Preset((320, 320), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), by_brightest=True, stretch=True),
        # github.com/xuebinqin/DIS: IS-Net/Inference.py
        "isnet": Preset((1024, 1024), (0.5,) * 3, (1.0,) * 3, by_brightest=False, stretch=True),
        # github.com/SkyTNT/anime-segmentation: get_mask of its demo
        "anime": Preset((1024, 1024), (0.0,) * 3, (1.0,) * 3, by_brightest=False, stretch=False, is_whole=True),
        # MediaPipe, selfie_segmentation_cpu.pbtxt: output_tensor_float_range 0..1, activation none
        "selfie": Preset((256, 256), (0.0,) * 3, (1.0,) * 3, by_brightest=False, stretch=False),
    }
)


def recognise(file: NetworkFile) -> str:
    """Return the name of the preset that a file's input tells. Raises: OptionError."""
    if file.channels_last:
        return "selfie"
    if file.size == PRESETS["u2net"].size:
        return "u2net"
    if file.input_name == ANIME_INPUT:
        return "anime"
    if file.size == PRESETS["isnet"].size:
        return "isnet"
    said = "x".join("any" if side is None else str(side) for side in file.size)
    raise OptionError(
        f"--model {file.path}: takes pictures of {said} pixels, by which it cannot be recognised. "
        f"Say with --preset which of {', '.join(PRESETS)} it is like."
    )


def load(path: Path, *, preset: str | None, engine: str | None, batch_size: int) -> Source:
    """Return a source that asks a segmentation model; a batch of pictures at a time, whatever thread calls it.

    Args:
        path: of an ONNX or TFLite file.
        preset: of PRESETS; None recognises it.
        engine: "onnxruntime" or "opencv"; None takes the first that is there.
        batch_size: pictures that it may get at a time.

    Raises: OptionError, CheckpointError.
    """
    file = read_network_file(path)
    name = preset or recognise(file)
    how = PRESETS[name]
    engine = choose_engine(file, engine)
    run = (_onnxruntime if engine == "onnxruntime" else _opencv)(file)
    size = (file.size[0] or how.size[0], file.size[1] or how.size[1])
    most = batch_size if file.shape[0] is None else min(batch_size, file.shape[0])
    if most < batch_size:
        log.warning("--batch_size %d: %s takes %d at a time", batch_size, path.name, most)
    log.info("model: %s, prepared for like %s at %dx%d, run by %s", path.name, name, *size, engine)
    alone = threading.Lock()  # of several threads that read and write pictures, one asks the model

    def draw(pictures: Sequence[Picture]) -> list[Drawn]:
        prepared = np.stack([prepare(picture, size, how, file.channels_last) for picture in pictures])
        answers: list[Floats] = []
        with alone:
            for start in range(0, len(prepared), most):
                answers += _whole_batch(run, prepared[start : start + most], file.shape[0])
        return [read_answer(answer, picture, how) for answer, picture in zip(answers, pictures, strict=True)]

    return draw


def _whole_batch(run: Run, pictures: Floats, fixed: int | None) -> list[Floats]:
    """Return the answers of a batch, which is filled up where the file asks for a number of pictures."""
    lacking = 0 if fixed is None else fixed - len(pictures)
    filled = np.concatenate([pictures, np.repeat(pictures[-1:], lacking, axis=0)]) if lacking else pictures
    return list(run(filled)[: len(pictures)])


def choose_engine(file: NetworkFile, wanted: str | None) -> str:
    """Return what runs a file. Raises: OptionError where what is wanted cannot."""
    has_onnxruntime = importlib.util.find_spec("onnxruntime") is not None
    if wanted == "onnxruntime" and file.kind == "tflite":
        raise OptionError(f"--engine onnxruntime cannot run {file.path.name}, a TFLite file. Leave --engine out.")
    if wanted == "onnxruntime" and not has_onnxruntime:
        raise OptionError("--engine onnxruntime: it is not installed. Run pip install onnxruntime, or leave it out.")
    return wanted or ("onnxruntime" if has_onnxruntime and file.kind == "onnx" else "opencv")


def prepare(picture: Picture, size: tuple[int, int], how: Preset, channels_last: bool) -> Floats:
    """Return a picture as a model takes it: (3, H, W), or (H, W, 3), of the given (width, height)."""
    rgb = picture.rgb
    if picture.alpha is not None:
        opaque = picture.alpha[..., None].astype(np.float32) / 255
        rgb = np.rint(rgb * opaque + PAPER * (1 - opaque)).astype(np.uint8)
    left, top, right, bottom = part_seen((rgb.shape[1], rgb.shape[0]), size, how)
    small = np.zeros((size[1], size[0], 3), np.float32)
    resized = Image.fromarray(rgb).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    small[top:bottom, left:right] = np.asarray(resized)
    small /= max(float(small.max()), 1.0) if how.by_brightest else 255.0
    normal = (small - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)
    return np.ascontiguousarray(normal if channels_last else normal.transpose(2, 0, 1), np.float32)


def part_seen(picture: Size, size: Size, how: Preset) -> tuple[int, int, int, int]:
    """Return where in what a model sees, of a size (width, height), the picture is: (left, top, right, bottom)."""
    if not how.is_whole:
        return 0, 0, *size
    scale = min(size[0] / picture[0], size[1] / picture[1])
    width, height = (max(1, int(side * scale + 1e-6)) for side in picture)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def read_answer(answer: Floats, picture: Picture, how: Preset) -> Drawn:
    """Return a model's answer (h, w) as a mask of its picture's size."""
    low, high = float(answer.min()), float(answer.max())
    if not np.isfinite((low, high)).all():
        raise CheckpointError("--model: its answer is not a number. Try --engine, or another --preset.")
    doubt = ""
    if high < FAINT:  # to stretch this would make a subject out of noise
        doubt = f"the model found nothing, its strongest answer is {max(0.0, high):.0%}"
    elif how.stretch and high > low:
        answer = (answer - low) / (high - low)
    height, width = picture.rgb.shape[:2]
    left, top, right, bottom = part_seen((width, height), (answer.shape[1], answer.shape[0]), how)
    answer = answer[top:bottom, left:right]
    if not doubt and (share := share_unsure(answer)) > MOSTLY:
        doubt = f"the model is unsure of {share:.0%} of what it found"
    smaller = width * height < answer.size
    full = cv2.resize(answer, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
    return Drawn(np.rint(full.clip(0, 1) * 255).astype(np.uint8), doubt)


def share_unsure(answer: Floats) -> float:
    """Return how much of what is not masked out is grey."""
    not_out = int((answer >= UNSURE[0]).sum())
    return float(((answer >= UNSURE[0]) & (answer < UNSURE[1])).sum()) / not_out if not_out else 0.0


def _maps(output: Floats, file: NetworkFile) -> Floats:
    """Return a model's output as (B, H, W). Raises: CheckpointError if it has more than one map a picture."""
    maps = output
    if maps.ndim == 4:
        axis = 1 if maps.shape[1] == 1 else 3
        if maps.shape[axis] != 1:
            raise CheckpointError(
                f"--model {file.path}: answers with {min(maps.shape[1], maps.shape[3])} maps a picture, not one. "
                "Give a model that tells a subject from its background."
            )
        maps = maps.squeeze(axis)
    if maps.ndim != 3:
        raise CheckpointError(f"--model {file.path}: answers with {maps.ndim} dimensions, which is no picture.")
    return np.ascontiguousarray(maps, np.float32)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep OpenCV from telling what it thinks of a file: of shapes, which it then gets right, and errors twice."""
    place: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 5 has it there, 4 at the top
    level = place.getLogLevel()
    place.setLogLevel(FATAL)
    try:
        yield
    finally:
        place.setLogLevel(level)


def _opencv(file: NetworkFile) -> Run:
    """Return what runs a file by OpenCV. Raises: CheckpointError."""
    try:
        read = cv2.dnn.readNetFromTFLite if file.kind == "tflite" else cv2.dnn.readNetFromONNX
        with _hushed():
            network = read(str(file.path))
    except cv2.error as error:
        raise _unusable(file, "OpenCV", error) from None
    # The first output is the finest one. OpenCV names those of ONNX files as the file does.
    names = network.getUnconnectedOutLayersNames()
    first = file.outputs[0] if file.outputs[0] in names else names[0]

    def run(pictures: Floats) -> Floats:
        try:
            # OpenCV has the channels of TFLite networks in front, whatever the file says
            network.setInput(pictures.transpose(0, 3, 1, 2).copy() if file.kind == "tflite" else pictures)
            output = network.forward(first)
        except cv2.error as error:
            raise _unusable(file, "OpenCV", error) from None
        return _maps(np.asarray(output, np.float32), file)

    return run


def _onnxruntime(file: NetworkFile) -> Run:
    """Return what runs a file by onnxruntime. Raises: CheckpointError."""
    import onnxruntime

    wanted = ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider", "CPUExecutionProvider")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors; it warns about how the file was written
    try:
        session = onnxruntime.InferenceSession(
            str(file.path), settings, [name for name in wanted if name in onnxruntime.get_available_providers()]
        )
    except Exception as error:  # its own exceptions have no common base
        raise _unusable(file, "onnxruntime", error) from None

    def run(pictures: Floats) -> Floats:
        given: Any = pictures.astype(np.float16) if file.is_half else pictures
        try:
            output = session.run([file.outputs[0]], {file.input_name: given})[0]
        except Exception as error:  # likewise
            raise _unusable(file, "onnxruntime", error) from None
        return _maps(output, file)

    return run


def _unusable(file: NetworkFile, engine: str, error: Exception) -> CheckpointError:
    text = " ".join(str(error).split())
    layer = re.search(r"Node \[(\w+)@", text)  # OpenCV's words; what follows them are lines of its code
    reason = f"its layer {layer[1]}" if layer else re.sub(r"^OpenCV\S* \S+: error: \S+ ?", "", text)[:200]
    other = "Give another model." if engine == "onnxruntime" else "What is installed by pip install onnxruntime may."
    return CheckpointError(f"--model {file.path}: {engine} cannot run it ({reason}). {other}")
