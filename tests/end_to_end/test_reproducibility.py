"""The same seed gives the same training, whatever happens beside it."""

import numpy as np
import pytest
from end_to_end.training_runs import Trained, differing, save, subset, write_toml


@pytest.fixture
def config(pictures, tmp_path):
    """Write a config in which chance has a say: captions, flips, order, wildcards."""
    chance = {"shuffle_caption": True, "caption_dropout_rate": 0.2, "flip_aug": True, "random_crop": True}
    chance |= {"color_aug": True, "enable_wildcard": True}
    for i in range(3):
        save(tmp_path / "images", f"i{i}", np.random.default_rng(i).integers(0, 256, (80, 100, 4), dtype=np.uint8),
             "a {red|green|blue} cat, one, two, three")  # fmt: skip
    return write_toml(
        tmp_path / "chance.toml",
        subset(tmp_path / "images", alpha_mask=True, **chance),
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks, num_repeats=2, **chance),
    )


def same(one: Trained, other: Trained) -> bool:
    return one.losses == other.losses and not differing(one.tensors, other.tensors)


def test_the_same_seed_trains_the_same_network_whatever_stands_beside_it(train, config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\na dog --w 64 --h 64 --s 1\n")
    steps = ("--max_train_steps", 4, "--network_dropout", 0.1, "--noise_offset", 0.1)
    first = train(config, *steps, name="first")
    assert same(first, train(config, *steps, name="again"))
    assert same(first, train(config, *steps, "--max_data_loader_n_workers", 2, name="workers"))
    previews = ("--sample_prompts", prompts, "--sample_at_first", "--sample_every_n_steps", 1)
    assert same(first, train(config, *steps, *previews, "--save_every_n_steps", 1, "--report", name="previews"))
    other = train(config, *steps, "--seed", 8, name="other seed")
    assert first.losses != other.losses
    assert differing(first.tensors, other.tensors)


def test_a_run_without_seed_is_repeated_by_the_seed_in_its_metadata(train, pictures, tmp_path):
    config = write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))
    first = train(config, name="first", seed=None)
    other = train(config, name="other", seed=None)
    assert not same(first, other)
    assert same(first, train(config, name="again", seed=first.metadata["ss_seed"]))
