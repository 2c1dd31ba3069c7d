"""Training steps of SD3.5 medium at its true size on a GPU: what swapped blocks and left out tokens give and cost.

Weights are random and made on the device; nothing is downloaded or written. A step is the project's own: flow,
denoiser, loss, masks, backward pass and AdamW, for LoRA of rank 16 on every Linear of the joint blocks, bf16,
1024x1024, gradient checkpointing. Texts and latents are as the caches give them. Time is taken on the device, from one
step to the next; memory is the peak of what torch had given out while the steps ran, weights included.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from gpu_step import Clock
from measuring import Figure, conclude, load, make_parser
from torch import Tensor, nn

from library.batch import Batch
from library.masks import kept_tokens
from library.models import block_swap
from library.models.family import Parts
from library.models.layout.mmdit import MmditShape
from library.models.mmdit import Mmdit
from library.models.sd3 import Sd3
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.training.step import Step
from networks.layers import Dropout, LoraLayer

WARM_UP = 4
RANK = 16
COVERAGE = 0.3  # of a picture by its mask
MIN_SPEED_UP = 2.0  # of leaving out what lies outside of it
MEDIUM = MmditShape(
    depth=24,
    width=1536,
    channels=16,
    patch=2,
    context_width=4096,
    pooled_width=2048,
    mlp_width=6144,
    has_qk_norm=True,
    num_dual=13,
    position_side=384,
)
TINY = MmditShape(
    depth=6,
    width=64,
    channels=16,
    patch=2,
    context_width=32,
    pooled_width=32,
    mlp_width=256,
    has_qk_norm=True,
    num_dual=3,
    position_side=16,
)


@dataclass(frozen=True)
class Case:
    """What one run is to show."""

    batch_size: int
    num_swapped: int = 0
    reach: int | None = None  # latent cells, see masks.kept_tokens

    @property
    def label(self) -> str:
        """The beginning of its figures' names."""
        words = [f"batch {self.batch_size}"]
        words += [f"{self.num_swapped} blocks swapped"] if self.num_swapped else []
        words += ["tokens left out"] if self.reach is not None else []
        return ", ".join(words)


@dataclass(frozen=True)
class Setup:
    """Sizes and numbers of all runs."""

    shape: MmditShape
    cells: int  # a side of the latent
    t5_length: int  # tokens
    steps: int  # that count
    device: torch.device


FAMILY = Sd3(trains_clip=False)  # so that all texts come from the cache


def make_denoiser(setup: Setup, num_swapped: int) -> Mmdit:
    """Return random weights, each block in its place."""
    shape = setup.shape
    with setup.device:
        torch.manual_seed(0)
        table = torch.randn(1, shape.position_side**2, shape.width, dtype=torch.bfloat16) * 0.02
        denoiser = Mmdit(shape, table.cpu())
    denoiser.to(torch.bfloat16).requires_grad_(False)
    block_swap.install(denoiser, num_swapped, setup.device)
    denoiser.enable_gradient_checkpointing()
    return denoiser


def make_network(parts: Parts, device: torch.device) -> nn.ModuleList:
    """Return LoRA layers, attached to all that networks.lora adapts in the denoiser."""
    targets = [target for target in FAMILY.lora_targets(parts) if target.kind == "attention"]
    layers = [LoraLayer(target, RANK, RANK, Dropout()) for target in targets]
    for layer in layers:
        layer.attach()
    return nn.ModuleList(layers).to(device)


def make_texts(setup: Setup, size: int, draws: torch.Generator) -> dict[str, Tensor]:
    """Return what the cache keeps of so many texts; CLIP-L's states are 3/8 as wide as the pooled text."""
    shape = setup.shape
    l_width = shape.pooled_width * 3 // 8
    g_width = shape.pooled_width - l_width
    sizes = {"clip_l": (77, l_width), "clip_g": (77, g_width), "t5": (setup.t5_length, shape.context_width)}
    sizes |= {"pooled_l": (l_width,), "pooled_g": (g_width,)}
    return {name: torch.randn(size, *each, generator=draws).bfloat16() for name, each in sizes.items()}


def make_batch(setup: Setup, case: Case) -> Batch:
    """Return a batch of random pictures with a square mask each, moved about."""
    size, cells, side = case.batch_size, setup.cells, round(COVERAGE**0.5 * setup.cells)
    draws = torch.Generator().manual_seed(1)
    masks = torch.zeros(size, 1, cells, cells)
    for index in range(size):
        top, left = torch.randint(cells - side + 1, (2,), generator=draws).tolist()
        masks[index, :, top : top + side, left : left + side] = 1
    pixels = torch.tensor([[8 * cells, 8 * cells]] * size)
    return Batch(
        names=("random",) * size,
        captions=("",) * size,
        tokens=None,
        images=None,
        latents=torch.randn(size, setup.shape.channels, cells, cells, generator=draws),
        masks=masks,
        weights=torch.ones(size),
        original_sizes=pixels,
        crop_top_lefts=torch.zeros(size, 2, dtype=torch.int64),
        target_sizes=pixels,
        text=make_texts(setup, size, draws),
        kept_tokens=None if case.reach is None else kept_tokens(masks, case.reach),
    )


@dataclass(frozen=True)
class Measured:
    """A run, its warm-up left out."""

    steps_s: tuple[float, ...]
    peak_gb: float | None  # None on the CPU
    share_kept: float  # of the picture's tokens


def measure(setup: Setup, case: Case) -> Measured:
    """Return what the steps of a case took."""
    device = setup.device
    parts = Parts(make_denoiser(setup, case.num_swapped), (), None)
    layers = make_network(parts, device)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-4, fused=device.type == "cuda")
    objective = FAMILY.objective(NoiseOptions(), LossOptions()).to(device)
    step = Step(FAMILY, parts, objective, LossOptions(), (layers,), is_text_trained=False)
    batch = make_batch(setup, case)
    if device.type == "cuda":
        batch = batch.pin_memory()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    for _ in range(WARM_UP + setup.steps):
        clock.mark()
        there = batch.to(device)
        assert there.latents is not None
        with torch.autocast(device.type, torch.bfloat16):
            loss = step(there, there.latents).per_image.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    clock.mark()
    seconds = clock.seconds()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    num_tokens = (setup.cells // setup.shape.patch) ** 2
    kept = num_tokens if batch.kept_tokens is None else batch.kept_tokens.shape[1]
    return Measured(tuple(seconds[WARM_UP:]), peak, kept / num_tokens)


def figures_of(case: Case, found: Measured, plain: Measured | None) -> Iterator[Figure]:
    """Yield the figures of a case; plain: of the same batch with all blocks on the device and all tokens computed."""
    rates = tuple(case.batch_size / second for second in found.steps_s)
    yield Figure(f"{case.label}: speed", "images/s", rates, WARM_UP)
    if found.peak_gb is not None:
        yield Figure(f"{case.label}: peak memory", "GB", (found.peak_gb,))
    if case.reach is not None:
        yield Figure(f"{case.label}: share that is kept", "%", (100 * found.share_kept,))
    if plain is None:
        return
    ratio = statistics.median(plain.steps_s) / statistics.median(found.steps_s)
    if case.reach is not None:
        yield Figure(f"{case.label}: speed-up", "times", (ratio,), at_least=MIN_SPEED_UP)
    elif case.num_swapped:
        yield Figure(f"{case.label}: speed of all on the device", "%", (100 * ratio,))


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Return what is measured; each batch size begins with its plain case."""
    cases = []
    for batch_size in arguments.batch_sizes:
        cases += [Case(batch_size), Case(batch_size, reach=arguments.reach)]
        cases += [Case(batch_size, number) for number in arguments.swapped if number]
    return cases


def measured_figures(setup: Setup, cases: Sequence[Case]) -> Iterator[Figure]:
    """Yield the figures of each case; one that does not fit in memory is said, and left out."""
    plain: dict[int, Measured] = {}
    for case in cases:
        try:
            found = measure(setup, case)
        except torch.OutOfMemoryError as error:
            print(f"{case.label}: {str(error).partition('.')[0]}", flush=True)
            continue
        finally:
            gc.collect()
            if setup.device.type == "cuda":
                torch.cuda.empty_cache()
        if case == Case(case.batch_size):
            plain[case.batch_size] = found
        for figure in figures_of(case, found, plain.get(case.batch_size)):
            print(figure.row(), flush=True)  # what is known stays known if the machine is taken away
            yield figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument(
        "--swapped", nargs="+", type=int, default=[0, 12, 22], help="numbers of blocks (default 0 12 22)"
    )
    parser.add_argument("--reach", type=int, default=4, help="--mask_token_drop, in latent cells (default 4)")
    parser.add_argument("--steps", type=int, default=20, help="that count (default 20)")
    parser.add_argument("--side", type=int, default=1024, help="of the pictures, in pixels (default 1024)")
    arguments = parser.parse_args(argv)
    logging.getLogger("library").setLevel(logging.WARNING)
    load_before = load()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, t5_length = MEDIUM, 256
    if arguments.quick:
        shape, t5_length = TINY, 5
        arguments.side, arguments.steps, arguments.batch_sizes, arguments.swapped = 256, 2, [1], [0, 2, 4]
        arguments.reach = 0
    setup = Setup(shape, arguments.side // 8, t5_length, arguments.steps, device)
    conclude(arguments, list(measured_figures(setup, cases_of(arguments))), load_before)


if __name__ == "__main__":
    main()
