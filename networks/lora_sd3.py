"""LoRA for Stable Diffusion 3 and 3.5: `--network_module networks.lora_sd3`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from networks import sd3_settings
from networks.face import LoraFace
from networks.layers import LayerMaker, LoraLayer
from networks.sd3_settings import KNOWN, Sd3Settings
from networks.settings import Settings
from networks.split_qkv import split_layers


def layers_for(_arguments: Mapping[str, Any], settings: Settings | None) -> LayerMaker:
    """Return what makes a layer; a file's qkv (settings None) is one layer however it was trained."""
    return split_layers if isinstance(settings, Sd3Settings) and settings.is_qkv_split else LoraLayer


FACE = LoraFace(KNOWN, layers_for, sd3_settings.read)

create_network = FACE.create_network
create_network_from_weights = FACE.create_network_from_weights
check_arguments = FACE.check_arguments
