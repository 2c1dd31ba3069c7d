"""Names of CLIP text encoders: transformers' (SD 1.x) and OpenCLIP's (SD 2.x; SDXL has both), and of LoRA modules."""

from __future__ import annotations

from collections.abc import Iterator

from library.models.layout.keys import KeyTable, beneath

SD1_PREFIX = "cond_stage_model.transformer."
SD2_PREFIX = "cond_stage_model.model."
SDXL_PREFIXES = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")  # CLIP-L's and bigG's
NESTED = "text_model."  # a level of older transformers; some old SD 1.x files lack it too

OPENCLIP_LAYER = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
OPENCLIP_OUTSIDE = (
    ("token_embedding", "embeddings.token_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final", "final_layer_norm"),
)
# how the names of transformers' weights start; position_ids, a counter in old files, is none
WEIGHTS = ("embeddings.token_embedding.", "embeddings.position_embedding.", "encoder.layers.", "final_layer_norm.")
# of OpenCLIP's comparison with pictures, which nothing in training reads: its name, and ln 100, where it ended
LOGIT_SCALE, LOGIT_SCALE_START = "logit_scale", 4.6052
# of the pooled text, if the encoder has one; OpenCLIP keeps it as (in, out), a linear layer as (out, in)
PROJECTION, OPENCLIP_PROJECTION = "text_projection.weight", "text_projection"
FUSED = ("q_proj", "k_proj", "v_proj")  # the order inside OpenCLIP's in_proj, along the output

LORA_MODULES = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def openclip_table(layers: int) -> KeyTable:
    """Return the names of OpenCLIP's text encoder, all but the fused q, k, v (see `fused_source`)."""
    pairs = [*OPENCLIP_OUTSIDE]
    for index in range(layers):
        pairs += beneath(f"transformer.resblocks.{index}", f"encoder.layers.{index}", OPENCLIP_LAYER)
    return KeyTable(tuple(pairs))


def fused_source(library_key: str) -> tuple[str, int] | None:
    """Return (OpenCLIP key, third) for a q, k or v tensor, None for every other key.

    "encoder.layers.3.self_attn.k_proj.weight" -> ("transformer.resblocks.3.attn.in_proj_weight", 1)
    """
    layer, _, tail = library_key.partition(".self_attn.")
    projection, _, tensor = tail.partition(".")
    if projection not in FUSED:
        return None
    index = layer.rpartition(".")[2]
    return f"transformer.resblocks.{index}.attn.in_proj_{tensor}", FUSED.index(projection)


def lora_paths(layers: int) -> Iterator[str]:
    """Yield the paths of a text encoder's LoRA modules, without `text_model.`, in the order of LoRA files."""
    for index in range(layers):
        for module in LORA_MODULES:
            yield f"encoder.layers.{index}.{module}"
