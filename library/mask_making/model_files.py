"""What the file of a network says about its inputs and outputs, read without the library that runs it."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from library.errors import CheckpointError

ONNX_FLOAT, ONNX_HALF = 1, 10  # TensorProto.DataType
TFLITE_FLOAT = 0  # TensorType
TFLITE_MARK = b"TFL3"  # at byte 4
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types

Shape = tuple[int | None, ...]  # None: any number


@dataclass(frozen=True)
class NetworkFile:
    """The face of a network that takes one picture."""

    path: Path
    kind: str  # "onnx" or "tflite"
    input_name: str
    shape: Shape  # (B, 3, H, W), or (B, H, W, 3)
    is_half: bool  # takes 16-bit numbers
    outputs: tuple[str, ...]

    @property
    def channels_last(self) -> bool:
        """Whether a picture goes in as (H, W, 3)."""
        return self.shape[1] != 3

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(width, height) of the picture that it takes; None: any."""
        height, width = self.shape[1:3] if self.channels_last else self.shape[2:4]
        return width, height


def read_network_file(path: Path) -> NetworkFile:
    """Return what a network's file says about itself. Raises: CheckpointError."""
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        found = (_read_tflite if data[4:8] == TFLITE_MARK else _read_onnx)(path, data)
    except OSError as error:
        raise CheckpointError(f"--model {path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, IndexError, struct.error, UnicodeDecodeError):
        raise CheckpointError(f"--model {path}: is no whole ONNX or TFLite file.") from None
    if len(found.shape) != 4 or 3 not in (found.shape[1], found.shape[3]):
        said = "x".join("?" if side is None else str(side) for side in found.shape)
        raise CheckpointError(f"--model {path}: takes {said}, which is no colour picture. Give a segmentation model.")
    return found


def _read_onnx(path: Path, data: memoryview) -> NetworkFile:
    graph = _only(data, 7)  # ModelProto.graph
    weights = set()
    inputs: list[memoryview] = []
    outputs: list[str] = []
    for number, value in _fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == 5:  # GraphProto.initializer; old files list weights among the inputs as well
            weights.add(_text(value, 8))
        elif number == 11:  # GraphProto.input
            inputs.append(value)
        elif number == 12:  # GraphProto.output
            outputs.append(_text(value, 1))
    pictures = [each for each in inputs if _text(each, 1) not in weights]
    if len(pictures) != 1 or not outputs:
        raise CheckpointError(
            f"--model {path}: takes {len(pictures)} inputs and gives {len(outputs)} outputs. "
            "Give a segmentation model, which takes one picture."
        )
    tensor = _only(_only(pictures[0], 2), 1)  # ValueInfoProto.type, TypeProto.tensor_type
    kinds = [value for number, value in _fields(tensor) if number == 1]
    if kinds[0] not in (ONNX_FLOAT, ONNX_HALF):
        raise CheckpointError(f"--model {path}: takes whole numbers (a quantised input), which is not supported.")
    dimensions = [value for number, value in _fields(_only(tensor, 2)) if number == 1]
    shape = tuple(_dimension(each) for each in dimensions if isinstance(each, memoryview))
    name = _text(pictures[0], 1)
    return NetworkFile(path, "onnx", name, shape, kinds[0] == ONNX_HALF, tuple(outputs))


def _dimension(data: memoryview) -> int | None:
    numbers = [value for number, value in _fields(data) if number == 1 and isinstance(value, int)]
    return numbers[0] if numbers and 0 < numbers[0] < 1 << 31 else None


def _only(data: memoryview, wanted: int) -> memoryview:
    """Return the message under a number. Raises: ValueError where there is none."""
    for number, value in _fields(data):
        if number == wanted and isinstance(value, memoryview):
            return value
    raise ValueError(wanted)


def _text(data: memoryview, wanted: int) -> str:
    return bytes(_only(data, wanted)).decode("utf-8")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of each field of a protobuf message. Source: protobuf's encoding guide."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == LENGTH:
            length, at = _varint(data, at)
        elif wire in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if wire == EIGHT_BYTES else 4
        else:
            raise ValueError(wire)
        if at + length > end:
            raise ValueError(length)
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(at)


def _read_tflite(path: Path, data: memoryview) -> NetworkFile:
    model = _offset(data, 0)
    graph = _table_in(data, _field(data, model, 2), 0)  # Model.subgraphs
    tensors, inputs, outputs = (_field(data, graph, number) for number in range(3))  # of SubGraph
    if _length(data, inputs) != 1:
        raise CheckpointError(f"--model {path}: takes {_length(data, inputs)} inputs, not one picture.")
    tensor = _table_in(data, tensors, _numbers(data, inputs)[0])
    kind = struct.unpack_from("<b", data, place)[0] if (place := _field(data, tensor, 1, True)) else TFLITE_FLOAT
    if kind != TFLITE_FLOAT:
        raise CheckpointError(f"--model {path}: takes whole numbers (a quantised input), which is not supported.")
    shape = tuple(side if side > 0 else None for side in _numbers(data, _field(data, tensor, 0)))
    return NetworkFile(path, "tflite", "", shape, False, ("",) * _length(data, outputs))


def _offset(data: memoryview, at: int) -> int:
    """Return the place that the flatbuffer's offset at a place leads to."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: memoryview, table: int, number: int, optional: bool = False) -> int:
    """Return the place of a table's field; 0 if it has its default. Raises: ValueError if it must be there."""
    index = table - int(struct.unpack_from("<i", data, table)[0])
    length = struct.unpack_from("<H", data, index)[0]
    at = 4 + 2 * number
    offset = int(struct.unpack_from("<H", data, index + at)[0]) if at < length else 0
    if not offset and not optional:
        raise ValueError(number)
    return table + offset if offset else 0


def _length(data: memoryview, vector: int) -> int:
    return int(struct.unpack_from("<I", data, _offset(data, vector))[0])


def _numbers(data: memoryview, vector: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{_length(data, vector)}i", data, _offset(data, vector) + 4)


def _table_in(data: memoryview, vector: int, number: int) -> int:
    if number >= _length(data, vector):
        raise ValueError(number)
    return _offset(data, _offset(data, vector) + 4 + 4 * number)
