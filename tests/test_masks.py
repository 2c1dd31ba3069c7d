import io
import json
import sys
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.geometry import Transform, apply, resize
from library.errors import OptionError
from library.masks import FULL, kept_tokens, shrink, to_array, to_weights, weigh

DATA = Path(__file__).parent / "data" / "masks"
RECORDS = json.loads((DATA / "reference.json").read_text())["records"]


@pytest.fixture(scope="module")
def reference():
    with np.load(DATA / "reference.npz") as arrays:
        return dict(arrays)


def centre_cut(record):
    (width, height), (resized_w, resized_h) = record["bucket_reso"], record["resized_size"]
    crop = ((resized_w - width) // 2, (resized_h - height) // 2)
    return Transform(tuple(record["image_size"]), (resized_w, resized_h), crop, (width, height), flip=record["flip"])


def sums_of(record, reference):
    kind = "rgba_png" if record["path"] == "alpha" else "mask_png"
    with Image.open(io.BytesIO(reference[f"in/{record['case']}/{kind}"].tobytes())) as image:
        mode, channel = ("RGBA", 3) if record["path"] == "alpha" else ("RGB", 0)
        pixels = np.asarray(image.convert("RGBA").convert(mode).getchannel(channel))
    return shrink(apply(centre_cut(record), pixels))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_weights_are_those_of_the_reference(record, reference):
    weights = to_weights(sums_of(record, reference))
    expected = torch.from_numpy(reference["weights/" + record["name"]])
    assert weights.shape == (1, *expected.shape)
    # The pixels are the same bytes; the reference adds 64 rounded float32 values, which costs it up to 1e-6.
    torch.testing.assert_close(weights[0], expected, rtol=0, atol=1e-6)


def test_a_masked_loss_is_that_of_the_reference(reference):
    small = [record for record in RECORDS if max(record["bucket_reso"]) <= 512]
    assert len(small) > 20
    for record in small:
        weights = to_weights(sums_of(record, reference))
        loss = torch.from_numpy(reference["loss_field"])[None, :, : weights.shape[1], : weights.shape[2]]
        mean = weigh(loss, weights[None]).mean().item()
        assert mean == pytest.approx(record["masked_loss_mean"], abs=2e-7), record["name"]


@pytest.mark.parametrize("case", ["odd_333x517_softdisc_RGBA", "bit_448x320_disc_1", "la_257x255_softdisc_LA"])
def test_pixels_are_those_of_the_reference_without_alpha(case, reference):
    record = next(r for r in RECORDS if r["name"] == f"{case}/r256/alpha")
    with Image.open(io.BytesIO(reference[f"in/{case}/rgba_png"].tobytes())) as image:
        pixels = np.asarray(image)
    cut = apply(centre_cut(record), pixels)
    assert (cut[..., :3].transpose(2, 0, 1) == reference[f"image/{case}"]).all()


def test_a_mask_image_is_cut_like_its_picture_where_sd_scripts_squashes_it():
    """On purpose: 389x701 fits a bucket of 192x320 only nearly, and a squashed mask lies beside what it covers."""
    with np.load(DATA / "other_aspect.npz") as arrays:
        reference = dict(arrays)
    with Image.open(io.BytesIO(reference["mask_png"].tobytes())) as image:
        pixels = np.asarray(image.convert("L"))
    cut = Transform((389, 701), (192, 346), (0, 13), (192, 320))
    weights = to_array(shrink(apply(cut, pixels)))
    assert np.abs(weights - reference["aligned"]).max() < 1e-6  # what sd-scripts makes of the same mask as transparency
    assert np.abs(weights - reference["squashed"]).max() > 0.5


def test_shrinking_loses_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80), dtype=np.uint8)
    sums = shrink(pixels)
    assert sums.shape == (6, 10)
    assert sums.dtype == np.uint16
    assert sums[2, 3] == pixels[16:24, 24:32].astype(int).sum()
    assert sums.astype(int).sum() == pixels.astype(int).sum()


def test_white_weighs_one_and_black_nothing():
    pixels = np.zeros((8, 16), dtype=np.uint8)
    pixels[:, 8:] = 255
    assert shrink(pixels).tolist() == [[0, FULL]]
    assert to_weights(shrink(pixels)).tolist() == [[[0.0, 1.0]]]


def test_a_grey_of_k_weighs_k_of_255():
    for k in (1, 64, 127, 254):
        weight = to_array(shrink(np.full((8, 8), k, dtype=np.uint8)))[0, 0]
        assert weight == np.float32(k / 255)


def test_a_half_covered_cell_counts_half():
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:4] = 255
    loss = torch.ones(1, 4, 1, 1)
    assert weigh(loss, to_weights(shrink(pixels))[None]).mean().item() == 0.5


def test_a_pixel_under_a_black_mask_adds_no_gradient():
    pixels = np.full((16, 16), 255, dtype=np.uint8)
    pixels[8:, :8] = 0
    prediction = torch.randn(2, 4, 2, 2, requires_grad=True)
    masks = to_weights(shrink(pixels))[None].expand(2, -1, -1, -1)
    weigh((prediction - 3).square(), masks).mean().backward()
    assert (prediction.grad[:, :, 1, 0] == 0).all()
    unmasked = torch.ones(2, 2, dtype=torch.bool)
    unmasked[1, 0] = False
    assert (prediction.grad[:, :, unmasked] != 0).all()


def test_without_masks_the_loss_is_left_alone():
    loss = torch.rand(2, 4, 3, 3)
    assert weigh(loss, None) is loss


def test_the_mean_of_a_masked_loss_counts_all_cells():
    masks = torch.tensor([[[[1.0, 0.0]]]])
    assert weigh(torch.full((1, 4, 1, 2), 6.0), masks).mean().item() == 3.0


def test_a_thin_line_keeps_its_exact_share():
    """A one-pixel line in 16 pixels a cell is 1/16; filters that count whole pixels say 0 or 1/8."""
    pixels = np.zeros((64, 128), dtype=np.uint8)
    pixels[:, 24] = 240  # a line that 2:1 halves to 120 exactly
    weights = to_array(shrink(resize(pixels, (64, 32), None)))
    assert weights[0, 1] == np.float32(120 / 255 / 8)
    assert weights.sum() == pytest.approx(4 * 120 / 255 / 8)


def masks_of(*pictures: str) -> torch.Tensor:
    """Return (B, 1, h, w) of rows of digits, tenths of a weight."""
    return torch.tensor([[[[int(cell) / 10 for cell in row] for row in picture.split()]] for picture in pictures])


CORNER = "00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000001"  # 8x8 cells, 4x4 tokens


def test_without_reach_the_tokens_that_hold_something_learnt_are_kept():
    two = "00000000 00900000 00000000 00000000 00000000 00000000 00000000 00000001"
    assert kept_tokens(masks_of(two), 0, multiple=1).tolist() == [[1, 15]]


@pytest.mark.parametrize(
    ("reach", "kept"),
    [
        (0, [15]),
        (1, [15]),  # the learnt cell lies at the token's far side: its neighbours' nearest cells are 2 away
        (2, [10, 11, 14, 15]),  # a diagonal step is as long as a straight one
        (3, [10, 11, 14, 15]),
        (4, [5, 6, 7, 9, 10, 11, 13, 14, 15]),
        (5, [5, 6, 7, 9, 10, 11, 13, 14, 15]),
    ],
)
def test_the_tokens_within_reach_are_kept(reach, kept):
    assert kept_tokens(masks_of(CORNER), reach, multiple=1).tolist() == [kept]


def test_a_reach_over_the_whole_picture_leaves_nothing_out():
    assert kept_tokens(masks_of(CORNER), 6, multiple=1) is None


def test_the_distance_is_that_of_a_slow_search():
    draws = np.random.default_rng(0)
    masks = torch.from_numpy((draws.random((3, 1, 24, 32)) > 0.99).astype(np.float32))
    for reach in (0, 1, 3):
        found = kept_tokens(masks, reach, multiple=1)
        wanted = []
        for mask in masks[:, 0].numpy():
            rows, columns = np.nonzero(mask)
            cells = np.stack(np.mgrid[:24, :32], axis=-1)[..., None, :] - np.stack((rows, columns), axis=-1)
            near = np.abs(cells).max(axis=-1).min(axis=-1) <= reach
            wanted.append(set(np.nonzero(near.reshape(12, 2, 16, 2).any(axis=(1, 3)).reshape(-1))[0].tolist()))
        assert found.shape == (3, max(map(len, wanted)))
        assert all(each <= set(row) for each, row in zip(wanted, found.tolist(), strict=True))
        assert all(row == sorted(set(row)) for row in found.tolist())


def test_an_image_that_needs_fewer_tokens_keeps_its_next_nearest():
    """The first needs two tokens, so the second keeps, beside its own one, the nearest of the others."""
    two = "00900000 00000000 00000000 00000000 00000000 00000000 00000000 00000001"
    one = "00000000 00000000 00000000 00000000 00000000 00000000 00000000 00009000"  # token 14, at its left side
    assert kept_tokens(masks_of(two, one), 0, multiple=1).tolist() == [[1, 15], [13, 14]]


def test_the_number_of_tokens_is_rounded_up():
    (kept,) = kept_tokens(masks_of(CORNER), 2, multiple=6).tolist()
    assert len(kept) == 6
    assert {10, 11, 14, 15} < set(kept)
    assert set(kept) <= {5, 6, 7, 9, 10, 11, 13, 14, 15}  # the next nearest


def test_rounding_up_never_asks_for_more_tokens_than_there_are():
    assert kept_tokens(masks_of(CORNER), 4, multiple=16) is None


def test_an_image_in_which_nothing_is_learnt_keeps_as_many_tokens_as_the_others():
    black = CORNER.replace("1", "0")
    (kept, _) = kept_tokens(masks_of(black, CORNER), 2, multiple=1).tolist()
    assert kept == [0, 1, 2, 3]
    assert kept_tokens(masks_of(black), 2, multiple=1).tolist() == [[0]]
    assert kept_tokens(masks_of(black), 2, multiple=5).shape == (1, 5)


def test_a_white_mask_leaves_nothing_out():
    white = CORNER.replace("0", "9")
    assert kept_tokens(masks_of(white), 0, multiple=1) is None
    assert kept_tokens(masks_of(CORNER, white), 0, multiple=1) is None


def test_the_least_weight_that_a_mask_can_have_is_near():
    masks = to_weights(np.array([[1, 0, 0, 0], [0, 0, 0, 0]], dtype=np.uint16))[None]
    assert kept_tokens(masks, 0, multiple=1).tolist() == [[0]]


def test_a_picture_that_does_not_divide_into_tokens_is_refused():
    with pytest.raises(OptionError, match=r"24x16 pixels do not divide into tokens of 16\. Choose a resolution"):
        kept_tokens(masks_of("000 000"), 0)


def test_masks_can_be_read_without_torch():
    code = "import sys, library.masks, library.dataset.images; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
