"""A TFLite file of one layer, written byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

FLOAT, BYTES = 0, 3  # TensorType
CONV_2D, CONV_2D_OPTIONS = 3, 1  # BuiltinOperator, BuiltinOptions

Field = int | str | bytes | list | tuple | None  # tuple: a table of fields; list: a vector of numbers or of tables


class Flatbuffer:
    """Bytes that grow: what is pointed at comes after what points."""

    def __init__(self, root: tuple[Field, ...], mark: bytes) -> None:
        self.data = bytearray(4) + mark
        self.point(0, self.table(root))

    def point(self, at: int, to: int) -> None:
        self.data[at : at + 4] = struct.pack("<I", to - at)

    def align(self, to: int, ahead: int = 0) -> int:
        """Fill up until what follows after `ahead` bytes is aligned; return the place of the next byte."""
        self.data += bytes(-(len(self.data) + ahead) % to)
        return len(self.data)

    def table(self, fields: Sequence[Field]) -> int:
        index = self.align(4, 2 * len(fields) % 4)
        places = [0 if field is None else 4 + 4 * number for number, field in enumerate(fields)]
        self.data += struct.pack(f"<{2 + len(fields)}H", 4 + 2 * len(fields), 4 + 4 * len(fields), *places)
        at = len(self.data)
        self.data += struct.pack("<i", at - index) + bytes(4 * len(fields))
        for number, field in enumerate(fields):
            slot = at + 4 + 4 * number
            if isinstance(field, int):
                self.data[slot : slot + 4] = struct.pack("<i", field)
            elif field is not None:
                self.point(slot, self.table(field) if isinstance(field, tuple) else self.vector(field))
        return at

    def vector(self, content: str | bytes | list) -> int:
        if isinstance(content, list):
            at = self.align(4)
            self.data += struct.pack(
                f"<I{len(content)}i", len(content), *(each if isinstance(each, int) else 0 for each in content)
            )
            for number, each in enumerate(content):
                if isinstance(each, tuple):
                    self.point(at + 4 + 4 * number, self.table(each))
            return at
        data = content.encode() if isinstance(content, str) else content
        at = self.align(16, 4)  # weights are read where they lie
        self.data += struct.pack("<I", len(data)) + data + b"\0"
        return at


def write_tflite(
    path: Path,
    *,
    height: int = 256,
    width: int = 256,
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    kind: int = FLOAT,
) -> Path:
    """Write a network that adds up red, green and blue with weights."""
    tensors = [
        ([1, height, width, 3], kind, 0, "picture"),
        ([1, 1, 1, 3], FLOAT, 1, "weights"),
        ([1], FLOAT, 2, "bias"),
        ([1, height, width, 1], FLOAT, 0, "answer"),
    ]
    layer = (0, [0, 1, 2], [3], CONV_2D_OPTIONS, (0, 1, 1, 0))
    buffers = [(b"",), (struct.pack("<3f", *weights),), (struct.pack("<f", 0.0),)]
    model = (3, [(CONV_2D, None, 1, CONV_2D)], [(tensors, [0], [3], [layer], "main")], "tiny", buffers)
    path.write_bytes(Flatbuffer(model, b"TFL3").data)
    return path
