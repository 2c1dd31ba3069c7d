"""What the settings of masks do to losses and gradients: scaled by area, held to the untrained model, measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from training.simple_steps import LATENTS, NoNoise, batch_of, doubler, losses_by

from library.batch import Batch
from library.dataset.config import SubsetConfig
from library.dataset.geometry import Transform
from library.dataset.loader import DrawnImages, LoaderSettings
from library.dataset.plan import Draw
from library.dataset.scan import Sample
from library.dataset.weighing import Shown, weigh
from library.losses import LOSS_TYPES
from library.masks import FULL, MaskSource, Sums
from library.options.loss import LossOptions
from library.training.metrics import MaskFigures
from library.training.step import Step

SIDE = 20  # cells; one row of them is 5 %
WHOLE = Transform((SIDE * 8, SIDE * 8), (SIDE * 8, SIDE * 8), (0, 0), (SIDE * 8, SIDE * 8))
NO_MASK = MaskSource("none")


def sums(rows: list[list[float]]) -> Sums:
    """Return a shrunk mask of these weights."""
    return np.round(np.array(rows) * FULL).astype(np.uint16)


def weighed(*images: Shown, every: int = 0, reach: int | None = None, batch: Batch | None = None) -> Batch:
    """Return a batch of these masks."""
    made = weigh(images, token_reach=reach, prior_every=every)
    return replace(batch or batch_of(weights=(1.0,) * len(images)), **vars(made))


def figures_of(step: Step, batch: Batch, latents: Tensor) -> MaskFigures | None:
    figures = step(batch, latents).figures
    return None if figures is None else MaskFigures.of_sums(figures.flatten().tolist())


def drawn(folder: Path, masks: dict[str, np.ndarray | None], subset: SubsetConfig, **more: int) -> DrawnImages:
    """Return the loader of grey pictures with these masks (H, W), None for one without, as files."""
    samples = []
    for name, mask in masks.items():
        Image.new("RGB", WHOLE.source, "grey").save(folder / f"{name}.png")
        source = NO_MASK
        if mask is not None:
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
            source = MaskSource("file", folder / "masks" / f"{name}.png")
        samples.append(Sample(folder / f"{name}.png", ("",), subset, 0, False, 1, 1, WHOLE, source))
    return DrawnImages(samples, LoaderSettings(1, 100, **more), tokenize=lambda texts: torch.zeros(len(texts), 1, 77))


def batch_at(loader: DrawnImages, count: int, step: int = 0) -> Batch:
    batch = loader[tuple(Draw(index, 0, 1, step) for index in range(count))]
    assert isinstance(batch, Batch)
    return batch


# ---- mask_area_norm, mask_area_floor ---------------------------------------------------------------------------

ROW = np.zeros((SIDE * 8, SIDE * 8), np.uint8)
ROW[40:48] = 255
WHITE = np.full_like(ROW, 255)


@pytest.mark.parametrize(("alpha", "ratio"), [(0.0, 0.05), (0.5, 0.05**0.5), (1.0, 1.0)])
def test_a_mask_of_a_twentieth_pulls_as_hard_as_mask_area_norm_says(alpha: float, ratio: float, tmp_path: Path):
    """The loss is the same in every cell; the norm of the gradient of a picture learnt whole is 1."""
    subset = SubsetConfig(tmp_path, mask_area_norm=alpha, mask_area_floor=0.001)
    norms = []
    for name, mask in {"row": ROW, "white": WHITE, "none": None}.items():
        step = doubler()
        batch = batch_at(drawn(tmp_path, {name: mask}, subset), 1)
        losses_by(step, batch, torch.full((1, 1, SIDE, SIDE), 3.0)).mean().backward()
        norms.append(abs(float(step.parts.denoiser.weight.grad)))
    assert norms[0] / norms[1] == pytest.approx(ratio, rel=1e-5)
    assert norms[1] == norms[2]


def test_mask_area_floor_is_the_least_that_is_divided_by():
    subset = SubsetConfig(Path(), mask_area_norm=1.0, mask_area_floor=0.5)
    quarter = Shown(subset, sums([[1, 0], [0, 0]]), 1.0)
    three = Shown(subset, sums([[1, 1], [1, 0]]), 1.0)
    loss = losses_by(doubler(), weighed(quarter, three), LATENTS)
    assert loss.tolist() == pytest.approx([1 / 4 / 0.5, (25 + 36 + 49) / 4 / 0.75])


def test_the_scale_by_area_comes_on_top_of_the_weight_of_the_image():
    subset = SubsetConfig(Path(), mask_area_norm=1.0)
    batch = weighed(Shown(subset, sums([[1, 0], [0, 0]]), 0.25), Shown(subset, None, 0.5))
    assert batch.weights.tolist() == pytest.approx([0.25 / 0.25, 0.5])


# ---- mask_weight_min -------------------------------------------------------------------------------------------


def test_no_cell_weighs_less_than_mask_weight_min():
    subset = SubsetConfig(Path(), mask_weight_min=0.25)
    batch = weighed(
        Shown(subset, sums([[1, 0.5], [0.1, 0]]), 1.0), Shown(SubsetConfig(Path()), sums([[1, 0.5], [0.1, 0]]), 1.0)
    )
    assert batch.masks[:, 0].flatten(1).tolist() == [[1, 0.5, 0.25, 0.25], pytest.approx([1, 0.5, 0.1, 0], abs=1e-4)]


def test_what_lies_outside_is_told_by_the_mask_itself_not_by_its_least_weight():
    subset = SubsetConfig(Path(), mask_weight_min=0.25)
    batch = weighed(Shown(subset, sums([[1, 0], [0, 0]]), 1.0), Shown(subset, None, 1.0))
    found = figures_of(doubler(), batch, LATENTS)
    assert (found.inside, found.outside) == pytest.approx((1, (4 + 9 + 16) / 3))
    assert found.share == pytest.approx((1 + 3 * 0.25) / 4)


# ---- mask_prior_weight, mask_prior_every -----------------------------------------------------------------------


def test_each_image_is_held_where_its_own_mask_is_black():
    """Predictions are x, and were x/2: drifts of x²/4, held with 0.5 and the weight of the image."""
    held = SubsetConfig(Path(), mask_prior_weight=0.5)
    latents = torch.cat([LATENTS, LATENTS, LATENTS[:1]])
    images = [
        Shown(held, sums([[1, 0], [0, 0.5]]), 1.0),
        Shown(held, sums([[1, 1], [1, 1]]), 1.0),
        Shown(held, None, 1.0),
        Shown(SubsetConfig(Path()), sums([[1, 0], [0, 0]]), 1.0),
        Shown(held, sums([[0, 0], [0, 0]]), 0.1),
    ]
    batch = weighed(*images, every=1)
    loss = losses_by(doubler(before=1.0), batch, latents)
    grey = 128 * 127.5 / 255 / 128  # what 16 bits make of a half
    expected = [
        (1 + 16 * grey) / 4 + 0.5 * (4 + 9 + 16 * (1 - grey)) / 4 / 4,
        43.5,
        7.5,
        25 / 4,
        0.1 * 0.5 * (1 + 4 + 9 + 16) / 4 / 4,
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-3)


def test_the_same_exponent_scales_what_is_held():
    subset = SubsetConfig(Path(), mask_prior_weight=1.0, mask_area_norm=1.0)
    batch = weighed(Shown(subset, sums([[0, 1], [1, 1]]), 1.0), Shown(subset, sums([[1, 0], [0, 0]]), 1.0), every=1)
    loss = losses_by(doubler(before=1.0), batch, LATENTS)
    assert loss.tolist() == pytest.approx([(4 + 9 + 16) / 3 + 1 / 4, 25 + (36 + 49 + 64) / 3 / 4])


def test_the_timesteps_weights_count_for_what_is_held_too():
    objective = NoNoise(element_weight=torch.tensor([2.0, 3.0])[:, None, None, None], image_weight=5.0)
    subset = SubsetConfig(Path(), mask_prior_weight=1.0)
    black = Shown(subset, sums([[0, 0], [0, 0]]), 1.0)
    loss = losses_by(doubler(objective, before=1.0), weighed(black, black, every=1), LATENTS)
    assert loss.tolist() == pytest.approx([5 * 2 * 7.5 / 4, 5 * 3 * 43.5 / 4])


def test_every_k_steps_gives_the_gradient_of_every_step_on_average(tmp_path: Path):
    """mask_prior_every = 3: the sum over three steps on a fixed batch is three times the gradient of every step."""
    subset = SubsetConfig(tmp_path, mask_prior_weight=0.7, mask_area_norm=0.5)
    masks = {"row": ROW, "white": WHITE, "none": None}
    latents = torch.randn(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def gradient(every: int) -> float:
        loader, step = drawn(tmp_path, masks, subset, prior_every=every), doubler(before=1.0)
        for number in range(3):
            losses_by(step, batch_at(loader, 3, number), latents).mean().backward()
        return float(step.parts.denoiser.weight.grad)

    assert gradient(3) == pytest.approx(gradient(1), rel=1e-5)
    assert abs(gradient(1) - gradient(0)) > 0.1 * abs(gradient(0))


def test_the_untrained_model_predicts_only_when_it_is_due_and_something_is_held(tmp_path: Path):
    subset = SubsetConfig(tmp_path, mask_prior_weight=0.7)
    latents = torch.ones(1, 1, SIDE, SIDE)
    counts = {}
    for name, mask in {"row": ROW, "white": WHITE, "none": None}.items():
        loader, step = drawn(tmp_path, {name: mask}, subset, prior_every=2), doubler(before=1.0)
        for number in range(4):
            step(batch_at(loader, 1, number), latents)
        counts[name] = len(step.family.predictions)
    assert counts == {"row": 4 + 2, "white": 4, "none": 4}


def test_validation_holds_nothing(tmp_path: Path):
    loader = drawn(tmp_path, {"row": ROW}, SubsetConfig(tmp_path, mask_prior_weight=0.7))
    assert batch_at(loader, 1).prior is None


def test_images_that_are_preserved_and_images_that_are_held_share_one_prediction():
    subset = SubsetConfig(Path(), mask_prior_weight=1.0)
    batch = weighed(Shown(subset, sums([[1, 0], [0, 0]]), 1.0), Shown(subset, None, 1.0), every=1)
    step = doubler(before=1.0)
    loss = losses_by(step, replace(batch, preserved=torch.tensor([False, True])), LATENTS)
    assert len(step.family.predictions) == 2
    assert loss.tolist() == pytest.approx([1 / 4 + (4 + 9 + 16) / 4 / 4, 43.5 / 4])


def test_what_is_not_computed_is_neither_held_nor_measured():
    """32x32 cells, white in the first: reach 0 leaves 64 of 256 tokens, so three quarters of the cells are dropped."""
    mask = np.zeros((32, 32), np.uint16)
    mask[0, 0] = FULL
    batch = weighed(Shown(SubsetConfig(Path(), mask_prior_weight=1.0), mask, 1.0), every=1, reach=0)
    assert batch.kept_tokens.shape == (1, 64)
    assert int((batch.prior > 0).sum()) == 64 * 4 - 1
    assert torch.equal(batch.regions[:, 1:], (batch.prior > 0).float())
    kept = torch.zeros(256)
    kept[batch.kept_tokens[0]] = 1
    assert torch.equal(kept.view(16, 16), (batch.regions.sum(dim=1)[0, ::2, 1::2] > 0).float())


# ---- what is measured ------------------------------------------------------------------------------------------


def test_the_losses_inside_and_outside_are_means_over_the_images_that_have_such_a_part():
    """Grey counts in part in both; an image without a mask counts in neither, whatever its loss."""
    plain = SubsetConfig(Path())
    masks = [[[1, 0.25], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]
    images = [Shown(plain, sums(each), 1.0) for each in masks] + [Shown(plain, None, 0.5)]
    latents = torch.cat([LATENTS, LATENTS])
    found = figures_of(doubler(), weighed(*images), latents)
    loss = latents.numpy()[:, 0] ** 2
    m = [sums(each) / FULL for each in masks]
    inside = [(loss[i] * m[i]).sum() / m[i].sum() for i in (0, 1)]
    outside = [(loss[i] * (1 - m[i])).sum() / (1 - m[i]).sum() for i in (0, 2)]
    assert found.inside == pytest.approx(np.mean(inside), rel=1e-5)
    assert found.outside == pytest.approx(np.mean(outside), rel=1e-5)
    assert found.share == pytest.approx(np.mean([each.mean() for each in m]), rel=1e-5)
    assert found.drift is None


def test_the_drift_is_measured_where_the_prediction_is_held():
    subset = SubsetConfig(Path(), mask_prior_weight=123.0)
    images = [Shown(subset, sums([[1, 1], [0, 0]]), 0.3), Shown(subset, sums([[1, 1], [1, 1]]), 1.0)]
    found = figures_of(doubler(before=1.0), weighed(*images, every=1), LATENTS)
    assert found.drift == pytest.approx((9 + 16) / 2 / 4)


def test_the_weights_of_image_and_timestep_do_not_move_the_curves():
    """Regularisation images and min-SNR weigh the loss that trains; the curves show the loss itself."""
    plain = SubsetConfig(Path(), mask_area_norm=1.0)
    mask = sums([[1, 0], [0, 0]])
    found = figures_of(doubler(NoNoise(image_weight=7.0)), weighed(*[Shown(plain, mask, 0.1)] * 2), LATENTS)
    assert (found.inside, found.outside) == pytest.approx(((1 + 25) / 2, (29 + 36 + 49 + 64) / 6))


def test_nothing_is_measured_without_masks():
    batch = weighed(Shown(SubsetConfig(Path()), None, 1.0), Shown(SubsetConfig(Path()), None, 0.5), every=1)
    assert (batch.masks, batch.regions, batch.prior) == (None, None, None)
    assert doubler()(batch, LATENTS).figures is None


def test_what_is_measured_changes_neither_loss_nor_gradient():
    images = [Shown(SubsetConfig(Path()), sums([[1, 0.5], [0.25, 0]]), 1.0), Shown(SubsetConfig(Path()), None, 0.5)]
    found = []
    for batch in (weighed(*images), replace(weighed(*images), regions=None)):
        step = doubler()
        loss = losses_by(step, batch, LATENTS)
        loss.mean().backward()
        found.append((loss.tolist(), float(step.parts.denoiser.weight.grad)))
    assert found[0] == found[1]


def test_a_step_reads_no_value_off_the_device():
    """Tensors without values stand for those of a device that is not waited for; reading one would fail."""
    subset = SubsetConfig(Path(), mask_prior_weight=1.0, mask_area_norm=1.0, mask_weight_min=0.1)
    batch = weighed(Shown(subset, sums([[1, 0], [0, 0]]), 1.0), Shown(subset, None, 1.0), every=1)
    step = doubler(before=1.0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = replace(
            batch, **{name: mode.from_tensor(getattr(batch, name)) for name in ("masks", "regions", "prior", "weights")}
        )
        losses = step(fake, mode.from_tensor(LATENTS))
        losses.per_image.mean().backward()
        assert losses.figures.shape == (4, 2)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            losses.figures[0, 0].item()


# ---- never a number that is none -------------------------------------------------------------------------------


def mask_of(kind: str) -> Sums | None:
    """Return a mask of 32x32 cells."""
    if kind == "none":
        return None
    mask = np.full((32, 32), {"white": FULL, "grey": FULL // 3}.get(kind, 0), np.uint16)
    if kind == "single":
        mask[17, 5] = 255  # one pixel of a cell's 64
    return mask


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["black", "white", "single", "grey", "none"]), min_size=1, max_size=3),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    floor=st.sampled_from([1e-6, 0.01, 1.0]),
    least=st.sampled_from([0.0, 0.1, 1.0]),
    prior=st.sampled_from([0.0, 1.0, 1e3]),
    every=st.sampled_from([0, 1, 7]),
    reach=st.sampled_from([None, 0, 3]),
    weight=st.sampled_from([0.0, 1.0]),
    loss_type=st.sampled_from(LOSS_TYPES),
    before=st.sampled_from([1.0, 2.0]),  # 2.0: nothing has been learnt yet
)
def test_no_combination_of_masks_and_settings_gives_a_number_that_is_none(
    kinds, alpha, floor, least, prior, every, reach, weight, loss_type, before
):
    subset = SubsetConfig(
        Path(), mask_area_norm=alpha, mask_area_floor=floor, mask_weight_min=least, mask_prior_weight=prior
    )
    batch = weighed(*[Shown(subset, mask_of(kind), weight) for kind in kinds], every=every, reach=reach)
    latents = torch.linspace(-2, 2, len(kinds) * 1024).view(-1, 1, 32, 32)
    step = doubler(loss=LossOptions(loss_type=loss_type), before=before)
    losses = step(batch, latents)
    losses.per_image.mean().backward()
    assert losses.per_image.isfinite().all()
    assert step.parts.denoiser.weight.grad.isfinite()
    assert (losses.figures is None) == (set(kinds) == {"none"})
    if losses.figures is not None:
        assert losses.figures.isfinite().all()
        found = MaskFigures.of_sums(losses.figures.flatten().tolist())
        assert 0 <= found.share <= 1 + 1e-6
        assert (found.inside is None) == (not set(kinds) & {"white", "single", "grey"})
        assert found.drift is None or (prior and every and weight and least < 1)
