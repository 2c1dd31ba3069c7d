"""Where pictures stand in their buckets: mask-aware crops and random placement in whole runs."""

import numpy as np
import pytest
from end_to_end.training_runs import differing, half, picture, save, subset, write_toml

FIRST = ("--max_train_steps", 1)


@pytest.fixture
def beside_the_middle(tmp_path):
    """A data set of wide pictures, of which a square at the left edge is learnt, outside of the cut in the middle."""
    for number in range(2):
        save(tmp_path / "wide", f"wide{number}", np.hstack((picture(number), picture(number + 5))), "a thing")
        mask = np.zeros((64, 128), np.uint8)
        mask[24:40, 4:20] = 255
        save(tmp_path / "masks", f"wide{number}", mask)
    return write_toml(tmp_path / "d.toml", subset(tmp_path / "wide", conditioning_data_dir=tmp_path / "masks"))


def test_a_mask_aware_crop_learns_what_the_cut_in_the_middle_misses(train, beside_the_middle):
    assert train(beside_the_middle, *FIRST, name="middle").losses == [0]
    crop = ("--mask_aware_crop",)
    aware = train(beside_the_middle, *FIRST, *crop, name="aware").losses
    assert min(aware) > 0
    closer = train(beside_the_middle, *FIRST, *crop, "--mask_aware_zoom", 2, "--cache_latents", name="closer").losses
    assert all(more > 2 * loss for more, loss in zip(closer, aware, strict=True))  # four times the area


def test_a_picture_placed_at_random_is_learnt_where_it_stands(train, pictures, tmp_path):
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos))
    placed = ("--random_placement", "--placement_scale", "0.5,0.5", "--placement_rotate", 10)
    whole = np.mean(train(config, *FIRST, name="whole").losses)
    live = train(config, *FIRST, *placed, name="live").losses
    assert 0.1 * whole < np.mean(live) < 0.5 * whole  # a quarter of the canvas
    cache = ("--cache_latents_to_disk", "--cache_dir", tmp_path / "cache", "--placement_variants", 3)
    cached = train(config, *FIRST, *placed, *cache, name="cached").losses
    assert 0.1 * whole < np.mean(cached) < 0.5 * whole
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 * 3


@pytest.mark.parametrize("cache", [(), ("--cache_latents", "--placement_variants", 2)], ids=["live", "cached"])
def test_what_is_masked_out_of_placed_pictures_changes_no_bit_of_the_network(cache, train, tmp_path):
    made = []
    for hidden in (1, 2):
        folder = tmp_path / f"run{hidden}"
        other = np.random.default_rng(hidden).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for number in range(2):
            shown = np.where(half()[..., None] > 0, picture(number), other)
            save(folder / "cats", f"cat{number}", np.dstack((shown, half())), "a cat")
        config = write_toml(folder / "d.toml", subset(folder / "cats", alpha_mask=True, mask_fill="extend"))
        placed = ("--random_placement", "--placement_scale", "0.7,1.5", "--placement_rotate", 20)
        made.append(train(config, *placed, *cache, name=f"trained{hidden}"))
    assert not differing(made[0].tensors, made[1].tensors)
    assert made[0].losses == made[1].losses
