"""Networks of one layer, written as ONNX files byte by byte: what they answer can be worked out by hand."""

import struct
from collections.abc import Sequence
from pathlib import Path

FLOAT, INTS = 1, 7  # TensorProto.DataType, AttributeProto.AttributeType


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def tensor(name: str, shape: Sequence[int], values: Sequence[float]) -> bytes:
    dimensions = [(1, side) for side in shape]
    return message(*dimensions, (2, FLOAT), (8, name), (9, struct.pack(f"<{len(values)}f", *values)))


def value(name: str, shape: Sequence[int | str], kind: int = FLOAT) -> bytes:
    dimensions = [(1, message((1, side) if isinstance(side, int) else (2, side))) for side in shape]
    return message((1, name), (2, message((1, message((1, kind), (2, message(*dimensions)))))))


def node(kind: str, inputs: Sequence[str], output: str, **attributes: Sequence[int]) -> bytes:
    described = [
        (5, message((1, name), *((8, number) for number in numbers), (20, INTS)))
        for name, numbers in attributes.items()
    ]
    return message(*((1, name) for name in inputs), (2, output), (3, output), (4, kind), *described)


def write_network(
    path: Path,
    *,
    shape: Sequence[int | str] = (1, 3, 320, 320),
    weights: Sequence[Sequence[float]] = ((1 / 3, 1 / 3, 1 / 3),),
    input_name: str = "input",
    kind: int = FLOAT,
    lists_weights: bool = False,
    layer: str = "Conv",
) -> Path:
    """Write a network that adds up red, green and blue with weights; a row of them for each map of its first output.

    A second output, as U²-Net's further ones, is something else.

    Args:
        path: to be written.
        shape: of its input: (B, 3, H, W), or (B, H, W, 3); a text stands for any number.
        weights: (maps, 3).
        input_name: of the picture.
        kind: number format of the picture.
        lists_weights: name the weights among the inputs too, as old files do.
        layer: what adds up.
    """
    flat = [weight for row in weights for weight in row]
    last = shape[1] != 3
    channels = {"strides": (1, 1), "kernel_shape": (1, 1)}
    first, answer = ("channels_first", "maps") if last else (input_name, "answer")
    nodes = [node(layer, (first, "weights"), answer, **channels), node("Conv", (first, "others"), "other", **channels)]
    if last:
        nodes.insert(0, node("Transpose", (input_name,), first, perm=(0, 3, 1, 2)))
        nodes.append(node("Transpose", (answer,), "answer", perm=(0, 2, 3, 1)))
    height, width = shape[1:3] if last else shape[2:4]
    out = (shape[0], height, width, len(weights)) if last else (shape[0], len(weights), height, width)
    inputs = [value(input_name, shape, kind)]
    if lists_weights:
        inputs.insert(0, value("weights", (len(weights), 3, 1, 1)))
    graph = message(
        *((1, each) for each in nodes),
        (2, "tiny"),
        (5, tensor("weights", (len(weights), 3, 1, 1), flat)),
        (5, tensor("others", (1, 3, 1, 1), (-1.0, -1.0, -1.0))),
        *((11, each) for each in inputs),
        (12, value("answer", out)),
        (12, value("other", (shape[0], 1, height, width))),
    )
    path.write_bytes(message((1, 8), (7, graph), (8, message((2, 13)))))
    return path
