"""Whole runs in which some pictures only keep the model as it is."""

import pytest
from end_to_end.training_runs import Pictures, write_toml
from end_to_end.training_runs import subset as plain

KEPT = {"custom_attributes.diff_output_preservation": True}


def test_the_first_step_on_preserved_pictures_has_no_loss(train, pictures: Pictures, tmp_path):
    config = write_toml(tmp_path / "d.toml", plain(pictures.photos, **KEPT))
    assert train(config, "--max_train_steps", 1).losses == pytest.approx([0], abs=1e-10)


def test_preserved_pictures_share_batches_with_others_cached_or_not(train, pictures: Pictures, tmp_path):
    kept = plain(pictures.regularisation, is_reg=True, **KEPT)
    config = write_toml(tmp_path / "d.toml", plain(pictures.photos), kept, batch_size=4)
    others = write_toml(
        tmp_path / "o.toml", plain(pictures.photos), plain(pictures.regularisation, is_reg=True), batch_size=4
    )
    slow = ("--learning_rate", "1e-12", "--max_train_steps", 1)
    loss, other = (train(each, *slow, name=each.stem).losses[0] for each in (config, others))
    assert 0 < loss < other
    assert train(config, "--cache_latents", "--gradient_checkpointing", name="cached").losses[0] > 0
