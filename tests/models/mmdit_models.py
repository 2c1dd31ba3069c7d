"""MMDiTs of the three models' layouts, narrow enough for tests, and the one of the reference."""

import numpy as np
import torch
from torch import nn

from library.models.layout.mmdit import MmditShape
from library.models.mmdit import Mmdit
from library.models.mmdit_blocks import HeadNorm
from tests.models.reference import DATA

LAYOUTS = {  # q/k norm, and how many of the first blocks have a second attention
    "medium": (False, 0),
    "5-medium": (True, 2),
    "5-large": (True, 0),
}
CONTEXT, POOLED, SIDE = 96, 80, 16


def narrow(layout="5-medium", *, depth=3, width=128, side=SIDE, seed=0):
    """Return an MMDiT with random weights everywhere, modulations and norms too."""
    has_qk_norm, num_dual = LAYOUTS[layout]
    shape = MmditShape(depth, width, 16, 2, CONTEXT, POOLED, 4 * width, has_qk_norm, num_dual, side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = Mmdit(shape, torch.randn(1, side * side, width))
        for module in denoiser.modules():
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, mean=1.0 if isinstance(module, HeadNorm) else 0.0, std=0.1)
    return denoiser.requires_grad_(False).eval()


def inputs(batch=2, height=12, width=16, texts=7, seed=0):
    """Return noisy latents, timesteps, texts and pooled texts."""
    draw = torch.Generator().manual_seed(seed)
    noisy = torch.randn(batch, 16, height, width, generator=draw)
    timesteps = torch.randint(0, 1001, (batch,), generator=draw)
    context = torch.randn(batch, texts, CONTEXT, generator=draw)
    return noisy, timesteps, context, torch.randn(batch, POOLED, generator=draw)


def tensors(denoiser):
    """Return an MMDiT's tensors under their original names, without the prefix."""
    return {"pos_embed": denoiser.positions.table, **denoiser.state_dict()}


def reference_tiny():
    """Return the tensors of the reference's tiny MMDiT, inputs, and the output that the reference got."""
    numbers = {name: torch.from_numpy(array) for name, array in np.load(DATA / "models/sd3_tiny.npz").items()}
    shape = MmditShape(2, 128, 16, 2, 48, 32, 512, True, 1, 4)
    draw = torch.Generator().manual_seed(10)  # its weights were drawn one after the other, and are not kept
    weights = Mmdit(shape, torch.empty(1, 16, 128, device="meta")).named_parameters()
    drawn = {name: torch.randn(weight.shape, generator=draw) * 0.05 for name, weight in weights}
    for name in ("x_embedder.proj.weight", "final_layer.adaLN_modulation.1.bias"):  # the first and the last
        kept = numbers[f"check/{name}"]
        assert torch.equal(drawn[name][: len(kept)], kept), f"{name}: this version of torch draws other numbers"
    taken = [numbers[f"in/{name}"] for name in ("latent", "timestep", "context", "pooled")]
    return {"pos_embed": numbers["pos_embed"], **drawn}, taken, numbers["mmdit_base_out"]
