"""A part of the images is held back: never trained on, and measured the same way each time."""

import json
import logging

import pytest
from end_to_end.training_runs import (
    Trained,
    arguments,
    differing,
    events_of,
    half,
    launch,
    picture,
    save,
    subset,
    write_toml,
)


@pytest.fixture
def images(tmp_path):
    """Draw five pictures with masks."""
    for i in range(5):
        save(tmp_path / "images", f"i{i}", picture(i), f"a cat, one, two, {i}")
        save(tmp_path / "masks", f"i{i}", half())
    return tmp_path / "images"


@pytest.fixture
def config(images, tmp_path):
    """Hold two of the five pictures back, in a config in which chance has a say."""
    keys = {"conditioning_data_dir": tmp_path / "masks", "shuffle_caption": True, "flip_aug": True}
    return write_toml(
        tmp_path / "split.toml", subset(images, num_repeats=2, **keys), batch_size=2, validation_split=0.4
    )


STEP, EPOCH = "loss/validation/step_average", "loss/validation/epoch_average"
CHANCE = ("--max_train_steps", 4, "--network_dropout", 0.1, "--noise_offset", 0.1)
STILL = ("--learning_rate", "1e-12")  # too little for any float32 to tell


def steps_of(run, tag: str) -> list[int]:
    return [event.step for event in events_of(run.folder / "logs").Scalars(tag)]


def test_training_is_bit_for_bit_the_same_however_often_it_is_measured(train, config):
    rarely = train(config, *CHANCE, "--validate_every_n_epochs", 9, name="rarely")
    often = train(config, *CHANCE, "--validate_every_n_steps", 1, name="often")
    assert not differing(rarely.tensors, often.tensors)
    assert rarely.losses == often.losses
    assert not {STEP, EPOCH} & set(events_of(rarely.folder / "logs").Tags()["scalars"])
    assert (steps_of(often, STEP), steps_of(often, EPOCH)) == ([1, 2, 3, 4], [1, 2])
    assert len(set(often.curve(STEP))) == 4, "the network changes, and its loss with it"


def test_the_same_weights_have_the_same_loss_whatever_is_drawn_in_training(train, config, caplog):
    with caplog.at_level(logging.INFO):
        still = train(config, *CHANCE, *STILL, "--validate_every_n_steps", 1, name="still")
    losses = still.curve(STEP)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert len(set(still.losses)) == 4
    divergences = [loss - average for loss, average in zip(losses, still.curve("loss/average"), strict=True)]
    assert still.curve("loss/validation/step_divergence") == pytest.approx(divergences, abs=1e-6)
    assert f"validation after step 4: loss {losses[3]:.4f}, training " in caplog.text
    others = train(config, *STILL, "--max_train_steps", 1, "--validation_seed", 1, "--max_validation_steps", 1)
    assert others.curve(EPOCH)[0] != pytest.approx(losses[0], rel=1e-6)
    assert [others.metadata[f"ss_{key}"] for key in ("validation_seed", "max_validation_steps")] == ["1", "1"]


def test_nothing_is_learnt_from_what_is_held_back(train, config, images):
    first = train(config, name="first")
    counts = [first.metadata[f"ss_num_{kind}_images"] for kind in ("train", "validation")]
    assert counts == ["6", "2"]
    tags = json.loads(first.metadata["ss_datasets"])[0]["tag_frequency"]["images"]
    trained = [i for i in range(5) if str(i) in tags]
    assert len(trained) == 3
    for i in set(range(5)) - set(trained):
        save(images, f"i{i}", picture(70 + i), "another caption")
    second = train(config, name="second")
    assert not differing(first.tensors, second.tensors)
    assert first.curve(EPOCH) != second.curve(EPOCH)
    save(images, f"i{trained[0]}", picture(50))
    assert differing(first.tensors, train(config, name="third").tensors)


def test_masks_and_both_caches_apply_to_what_is_held_back(train, images, tmp_path):
    def loss(name: str, colour: int, *cache: object) -> float:
        for i in range(5):
            save(tmp_path / f"{name}-masks", f"i{i}", half(colour))
        keys = subset(images, conditioning_data_dir=tmp_path / f"{name}-masks")
        toml = write_toml(tmp_path / f"{name}.toml", keys, validation_split=0.4)
        return train(toml, *STILL, "--max_train_steps", 1, *cache, name=name).curve(EPOCH)[0]

    assert loss("black", 0) == 0
    in_memory = loss("memory", 255, "--cache_latents")
    assert in_memory > 0
    assert loss("disk", 255, "--cache_latents_to_disk", "--cache_dir", tmp_path / "cache") == in_memory


def test_averaged_weights_are_measured_where_a_schedule_free_optimizer_saves_them(train, config, tmp_path):
    """The file that is saved holds the averaged weights: measured alone, it has the loss that was told of it."""
    fast = ("--optimizer_type", "AdamWScheduleFree", "--learning_rate", "1e-2", "--max_train_steps", 3)
    averaged = train(config, *fast, "--gradient_checkpointing", name="free")
    again = ("--network_weights", averaged.file, *STILL, "--max_train_steps", 1)
    assert train(config, *again, name="again").curve(EPOCH) == pytest.approx(averaged.curve(EPOCH), rel=1e-4)


def test_a_resumed_run_measures_what_the_uninterrupted_one_did_and_reports_all(train, config):
    every = (*CHANCE, "--validate_every_n_steps", 1, "--report")
    whole = train(config, *every, "--save_every_n_steps", 2, "--save_state", name="whole")
    resumed = train(config, *every, "--resume", whole.folder / "out" / "lora-step00000002-state", name="resumed")
    assert resumed.curve(STEP) == whole.curve(STEP)[2:]
    pages = [(run.folder / "out" / "lora-report.html").read_text(encoding="utf-8") for run in (whole, resumed)]
    lines = [page.split('class="line validation"')[1].split("/>")[0] for page in pages]
    assert lines[0] == lines[1]
    assert "images held back" in pages[0]


@pytest.mark.slow
def test_two_processes_share_the_batches_and_measure_what_one_does(train, family, images, tmp_path):
    """Three batches: one process has two of them, the other one."""
    config = write_toml(tmp_path / "d.toml", subset(images), batch_size=1, validation_split=0.6)
    steady = (*STILL, "--max_train_steps", 1, "--cache_latents")
    (alone,) = train(config, *steady, name="alone").curve(EPOCH)
    launch(family, 2, arguments(family, tmp_path / "pair", config, *steady), tmp_path)
    assert Trained(tmp_path / "pair", ()).curve(EPOCH) == pytest.approx([alone], rel=1e-5)
