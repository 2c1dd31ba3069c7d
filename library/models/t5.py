"""T5's encoder: built from a file, run over rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import OptionError, did_you_mean
from library.models import checkpoint
from library.models.checkpoint import TensorSource, build_on_meta, load_onto, require
from library.models.padding import attention_mask
from library.models.t5_tokens import EOS, PAD

PART = "T5 text encoder"
SHARED, OWN_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"  # two names of one tensor
FIRST = "encoder.block.0.layer.0.SelfAttention"
BIAS = f"{FIRST}.relative_attention_bias.weight"  # (buckets, heads)
WIDENED = "DenseReluDense.wo.weight"  # the end of the names of weights whose products leave float16's range
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


class GatedDense(nn.Module):
    """T5 v1.1's feed-forward layer, under the names of transformers' own.

    That one casts its input to the format in which the last weight is kept, so that weights kept in one byte each would
    round what goes through them to one byte too.
    """

    def __init__(self, wi_0: nn.Module, wi_1: nn.Module, wo: nn.Linear) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo = wi_0, wi_1, wo

    def forward(self, states: Tensor) -> Tensor:
        """Return what the layer makes of states (B, N, D), normed; in float32 where the model is in float16."""
        hidden = F.gelu(self.wi_0(states), approximate="tanh") * self.wi_1(states)
        kept_in = self.wo.weight.dtype
        return self.wo(hidden.to(kept_in) if kept_in.itemsize > 1 else hidden)


def build(file: TensorSource, dtype: torch.dtype) -> nn.Module:
    """Return transformers' T5EncoderModel with the weights of a file, its size read from their shapes.

    It never drops anything at random, also in train mode, in which checkpointed models are. In float16 the last weight
    of each feed-forward layer is float32, as the sums there are beyond 65,504.

    Args:
        file: names as transformers has them: "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight".
        dtype: of the other weights in memory; the file's may be any, float8 included.

    Raises:
        CheckpointError: tensors are missing or of a wrong shape.
    """
    module = build_on_meta(_maker(file))
    names = {name: stored_name(file, name) for name in module.state_dict()}
    require(file, names.values(), PART)
    tensors = ((name, file.read(stored)) for name, stored in names.items() if name != OWN_EMBEDDING)
    load_onto(module, _with_both_embeddings(tensors), dtype, str(file.path), PART, in_float32=_widened(names, dtype))
    return module


def stored_name(file: TensorSource, name: str) -> str:
    """Return a tensor's name in the file: of the embedding's two names files may have either."""
    if name in (SHARED, OWN_EMBEDDING):
        return SHARED if SHARED in file.shapes or OWN_EMBEDDING not in file.shapes else OWN_EMBEDDING
    return name


def _widened(names: Mapping[str, str], dtype: torch.dtype) -> frozenset[str]:
    """Return the names of the tensors that are kept in float32 instead of dtype."""
    return frozenset(name for name in names if dtype == torch.float16 and name.endswith(WIDENED))


def _with_both_embeddings(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        if name == SHARED:
            yield OWN_EMBEDDING, tensor


def _maker(file: TensorSource) -> Callable[[], Any]:
    """Return what makes an encoder of the size of a file's. Raises: CheckpointError: there is none in it."""
    embedding, query, inner = stored_name(file, SHARED), f"{FIRST}.q.weight", "encoder.block.0.layer.1.DenseReluDense"
    require(file, (embedding, query, BIAS, f"{inner}.wi_0.weight", f"{inner}.wo.weight"), PART)
    vocabulary, width = file.shapes[embedding]
    buckets, heads = file.shapes[BIAS]
    layers = 1 + max(int(name.split(".")[2]) for name in file.shapes if name.startswith("encoder.block."))

    def make() -> Any:
        from transformers import T5Config, T5EncoderModel

        config = T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=file.shapes[query][0] // heads,
            d_ff=file.shapes[f"{inner}.wi_0.weight"][0],
            num_layers=layers,
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        model = T5EncoderModel(config)
        # one module for both names: transformers 5 has two, whose weights would be loaded twice
        model.set_input_embeddings(model.shared)
        blocks: Any = model.encoder.block
        for block in blocks:
            dense = block.layer[-1].DenseReluDense
            block.layer[-1].DenseReluDense = GatedDense(dense.wi_0, dense.wi_1, dense.wo)
        return model

    return make


def encode(text_encoder: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the states (B, N, D) of tokens (B, N), in the format of the encoder's weights.

    Autocast is off where the encoder has a format of its own, and in float16, where autocast would take the float32
    that some weights are in from them.

    Args:
        text_encoder: from `build`.
        tokens: int64, on its device.
        mask: (B, N) bool, False for padding, at which no token looks; None: all look at all.
    """
    model: Any = text_encoder
    dtype, device = model.shared.weight.dtype, tokens.device.type
    is_disturbed = (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and (dtype == torch.float16 or torch.get_autocast_dtype(device) != dtype)
    )
    if mask is not None:
        mask = attention_mask(mask, dtype, looks_back=False)
    with torch.autocast(device, enabled=False) if is_disturbed else nullcontext():
        states: Tensor = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    return states


def fingerprint(file: TensorSource) -> str:
    """Return 32 hex digits that identify an encoder, read without loading it; at most 8 rows of a tensor are read.

    It is the same whichever of its two names the embedding has.

    Raises:
        CheckpointError: there is no encoder.
    """
    names = {name: name for name in file.shapes if name.startswith("encoder.")} | {SHARED: stored_name(file, SHARED)}
    names.pop(OWN_EMBEDDING, None)
    require(file, (BIAS, names[SHARED]), PART)
    return checkpoint.fingerprint(file, names)


def original_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Return the weights under their names in a file of their own, all in one format; the embedding is there once."""
    model: Any = text_encoder
    dtype, tensors = model.shared.weight.dtype, text_encoder.state_dict()
    return {
        name: tensor.to(dtype) if name.endswith(WIDENED) and tensor.dtype == torch.float32 else tensor
        for name, tensor in tensors.items()
        if name != OWN_EMBEDDING
    }


def placement(device: str | None, dtype: str | None) -> tuple[torch.device | None, torch.dtype | None]:
    """Return --t5xxl_device and --t5xxl_dtype as torch has them, None where they are not given.

    Raises:
        OptionError: there is no such device here, or no such format.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(
            f"--t5xxl_dtype {dtype}: no such format.{did_you_mean(dtype, DTYPES)} Known: {', '.join(DTYPES)}."
        )
    return None if device is None else _device(device), None if dtype is None else DTYPES[dtype]


def _device(name: str) -> torch.device:
    """Return the device of --t5xxl_device. Raises: OptionError: it is not there."""
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    here += ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (str(device) not in here and str(device) != "cpu:0"):
        raise OptionError(
            f"--t5xxl_device {name}: no such device here.{did_you_mean(name, here)} There are: {', '.join(here)}."
        )
    return device
