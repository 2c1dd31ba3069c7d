import gzip
import json

import numpy as np
import pytest
import torch

from library.errors import OptionError
from library.models.mmdit_positions import KEPT_WINDOWS, Positions, scaled_axis, start
from tests.models.reference import DATA

CPU = torch.device("cpu")
FACTS = json.loads(gzip.decompress((DATA / "models/sd3_positions.json.gz").read_bytes()))
NUMBERS = {name: torch.from_numpy(array) for name, array in np.load(DATA / "models/sd3_positions.npz").items()}
CROPS = FACTS["pos_embed_crops"]
SCALED = [name for name in NUMBERS if name.startswith("scaled_crop")]


def counted(side):
    """Return a table whose rows say where they stand: (1, side * side, 2) of row and column."""
    index = torch.arange(side)
    return Positions(torch.cartesian_prod(index, index)[None].float(), 2)


def corner(window):
    return window[0, 0].tolist()


# ---- the table ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: f"{crop['max_size']}-{crop['latent_hw']}")
def test_a_picture_takes_the_references_window_of_the_middle(crop):
    height, width = (cells + cells % 2 for cells in crop["latent_hw"])  # the reference pads odd ones
    window = counted(crop["max_size"]).of(height, width, None, CPU)
    assert window.shape[1] == crop["tokens"]
    assert (corner(window), window[0, -1].tolist()) == (crop["center_top_left"], crop["bottom_right"])


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: f"{crop['max_size']}-{crop['latent_hw']}")
def test_every_random_window_of_the_reference_can_be_drawn(crop):
    side, lengths = crop["max_size"], [(cells + 1) // 2 for cells in crop["latent_hw"]]
    for drawn in crop["random"]:
        rooms = [side - length + 1 for length in lengths]
        offset = tuple((place + 0.5) / room for place, room in zip(drawn["top_left"], rooms, strict=True))
        assert [start(side, length, offset, axis) for axis, length in enumerate(lengths)] == drawn["top_left"]


def test_random_windows_reach_both_ends_of_the_table_and_stay_in_it():
    positions = counted(10)
    assert corner(positions.of(8, 12, (0.0, 0.0), CPU)) == [0, 0]
    last = positions.of(8, 12, (0.999999, 0.999999), CPU)
    assert (corner(last), last[0, -1].tolist()) == ([6, 4], [9, 9])


def test_a_picture_as_large_as_the_table_takes_all_of_it():
    positions = counted(10)
    assert torch.equal(positions.of(20, 20, (0.7, 0.3), CPU), positions.table)
    assert torch.equal(positions.of(20, 20, None, CPU), positions.table)


@pytest.mark.parametrize(("height", "width"), [(22, 8), (8, 22)])
def test_a_picture_larger_than_the_table_is_refused_with_both_sizes(height, width):
    words = f"a picture of {width * 8}x{height * 8} pixels is larger .* ends at 160 pixels a side.*--resolution"
    with pytest.raises(OptionError, match=words) as refusal:
        counted(10).of(height, width, None, CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("height", "width"), [(7, 8), (8, 7)])
def test_a_picture_that_does_not_divide_into_tokens_is_refused(height, width):
    with pytest.raises(OptionError, match=f"{width * 8}x{height * 8} pixels does not divide .* 16x16 pixels"):
        counted(10).of(height, width, None, CPU)


def test_a_window_of_the_middle_is_cut_once_and_few_are_kept():
    positions = counted(40)
    first = positions.of(8, 8, None, CPU)
    assert positions.of(8, 8, None, CPU) is first
    for size in range(10, 10 + 2 * KEPT_WINDOWS, 2):
        positions.of(size, 8, None, CPU)
    again = positions.of(8, 8, None, CPU)
    assert again is not first
    assert torch.equal(again, first)


# ---- scaled -------------------------------------------------------------------------------------------------------
def scaled(width=64, sides=(512, 768, 1024)):
    positions = Positions(torch.zeros(1, 16, width), 2)
    positions.scale_to([(side, side) for side in sides])
    return positions


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_are_the_references(name):
    height, width = (int(cells) for cells in name.split("_")[2].split("x"))
    window = scaled().of(height, width, None, CPU)
    assert window.shape == (1, height * width // 4, 64)
    torch.testing.assert_close(window[0, [0, 1, -1]], NUMBERS[name], atol=2e-6, rtol=0)


def test_a_scaled_grid_is_the_references():
    positions = Positions(torch.zeros(1, 16, 16), 2)
    positions.scale_to([(128, 128)])
    grid = positions.of(24, 24, None, CPU)[0]
    torch.testing.assert_close(grid, NUMBERS["scaled_dim16_grid12_sample8"], atol=1e-6, rtol=0)
    positions.scale_to([(1024, 1024)])
    diagonal = positions.of(192, 192, None, CPU)[0].view(96, 96, 16).diagonal().T
    torch.testing.assert_close(diagonal, NUMBERS["scaled_dim16_grid96_sample64_rows0_95"], atol=2e-6, rtol=0)


def test_pictures_take_the_grid_of_the_reference_that_their_area_is_nearest():
    wanted = FACTS["scaled_pos_embed"]
    assert [side * 2 for _, side in wanted["area_to_patched"]] == wanted["latent_sizes"]
    assert [list(each) for each in scaled()._grids] == wanted["area_to_patched"]


def test_resolutions_count_once_and_by_their_area():
    positions = Positions(torch.zeros(1, 16, 16), 2)
    positions.scale_to([(1024, 1024), (512, 512), (512, 2048), (512, 512)])
    assert [side for _, side in positions._grids] == [32, 64]


def test_a_scaled_grid_has_windows_at_an_offset_too():
    axis = scaled_axis(32, 32)
    window = scaled().of(64, 64, (0.0, 0.99), CPU)[0].view(32, 32, 64)
    assert torch.equal(window[:, 0, 32:], axis[:32])  # down: the first rows
    assert torch.equal(window[0, :, :32], axis[16:])  # across: the last columns


def test_the_middle_of_every_scaled_grid_spans_the_same_range():
    one, other = scaled_axis(32, 64), scaled_axis(64, 64)
    assert (len(one), len(other)) == (48, 96)
    torch.testing.assert_close(one[8], other[16])  # coordinate 0
    torch.testing.assert_close(one[24], other[48])  # coordinate 8


def test_windows_of_the_table_are_forgotten_when_positions_are_scaled():
    positions = Positions(torch.zeros(1, 256, 16), 2)
    before = positions.of(8, 8, None, CPU)
    positions.scale_to([(128, 128)])
    assert not torch.equal(positions.of(8, 8, None, CPU), before)
