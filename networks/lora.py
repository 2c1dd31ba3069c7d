"""LoRA for Linear and Conv2d (Hu et al. 2021, arXiv:2106.09685): `--network_module networks.lora`."""

from __future__ import annotations

from networks.face import LoraFace
from networks.settings import LORA

FACE = LoraFace(LORA)

create_network = FACE.create_network
create_network_from_weights = FACE.create_network_from_weights
check_arguments = FACE.check_arguments
