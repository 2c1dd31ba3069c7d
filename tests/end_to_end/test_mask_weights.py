"""Whole runs in which masks are weighed by area, what they leave out is held in place, and both sides are measured."""

from pathlib import Path

import numpy as np
import pytest
from end_to_end.conftest import masks_and_alpha
from end_to_end.training_runs import Pictures, Trained, differing, events_of, subset, write_toml

STILL = ("--learning_rate", "1e-12", "--max_train_steps", 2)  # so slow that every step sees the first step's weights


def tags_of(run: Trained) -> set[str]:
    return set(events_of(run.folder / "logs").Tags()["scalars"])


def steps_of(run: Trained, tag: str) -> list[int]:
    return [event.step for event in events_of(run.folder / "logs").Scalars(tag)]


def test_off_the_new_settings_change_no_bit(train, plain_run: Trained, pictures, tmp_path):
    """Settings that only say how another one acts change nothing while that is off."""
    off = ("--mask_area_norm", 0, "--mask_area_floor", 0.5, "--mask_prior_weight", 0, "--mask_weight_min", 0)
    run = train(masks_and_alpha(tmp_path, pictures), *off, "--max_train_steps", 4)
    assert run.losses == plain_run.losses
    assert not differing(run.tensors, plain_run.tensors)


def test_mask_area_norm_gives_back_what_a_grey_mask_takes(train, pictures: Pictures, tmp_path):
    """At 1 the loss under an even grey is that of the whole picture, unless mask_area_floor is above the grey."""
    grey = write_toml(tmp_path / "grey.toml", subset(pictures.photos, conditioning_data_dir=pictures.grey_masks))
    without = train(write_toml(tmp_path / "plain.toml", subset(pictures.photos)), *STILL, name="plain")
    plain = without.losses
    whole = train(grey, *STILL, "--mask_area_norm", 1, name="whole").losses
    floored = train(grey, *STILL, "--mask_area_norm", 1, "--mask_area_floor", 0.4, name="floored").losses
    assert whole == pytest.approx(plain, rel=1e-5)
    assert floored == pytest.approx([loss / 2 for loss in plain], rel=1e-5)
    assert not {tag for tag in tags_of(without) if "inside" in tag or "outside" in tag or "mask" in tag}


HELD = ("--mask_prior_weight", 0.5, "--mask_prior_every", 2, "--mask_area_norm", 0.5)
CACHES = ("--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only")


def test_a_resumed_run_goes_on_with_the_same_weights_curves_and_report(train, pictures: Pictures, tmp_path: Path):
    """What is held is held to the model before the training, not to what the state had learnt; so with caches."""
    config = write_toml(
        tmp_path / "chance.toml",
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks, flip_aug=True),
        subset(pictures.cutouts, alpha_mask=True, validation_split=0.5),
        subset(pictures.regularisation, is_reg=True),
        batch_size=1,
    )
    more = (*HELD, *CACHES, "--max_train_steps", 7, "--gradient_accumulation_steps", 2, "--report")
    whole = train(config, *more, "--save_every_n_steps", 3, "--save_state", name="whole")
    resumed = train(config, *more, "--resume", whole.folder / "out" / "lora-step00000003-state", name="resumed")
    assert not differing(whole.tensors, resumed.tensors)
    for tag in ("loss/inside", "loss/outside", "loss/drift_outside", "mask/share", "loss/inside_average"):
        late = [value for step, value in zip(steps_of(whole, tag), whole.curve(tag), strict=True) if step > 3]
        assert resumed.curve(tag) == late
        assert late
    assert resumed.curve("loss/validation/epoch_outside")[-1] == whole.curve("loss/validation/epoch_outside")[-1]
    charts = [chart_of(run) for run in (whole, resumed)]
    assert charts[0] == charts[1]
    assert charts[0].count("<svg") == 2
    assert whole.curve("mask/share") == [0.5] * len(whole.curve("mask/share"))
    drifts = dict(zip(steps_of(whole, "loss/drift_outside"), whole.curve("loss/drift_outside"), strict=True))
    assert set(drifts) <= {1, 3, 5, 7}  # when it is due
    assert drifts[min(drifts)] < 1e-4 * whole.curve("loss/outside")[0]  # nothing has been learnt then


def chart_of(run: Trained) -> str:
    """Return what a run's report tells of the losses inside and outside of masks."""
    page = (run.folder / "out" / "lora-report.html").read_text(encoding="utf-8")
    assert "photo0.png" in page.partition('class="bars"')[2]
    return page.partition("Loss inside and outside of the masks</h2>")[2].partition("</section>")[0]


@pytest.mark.slow
def test_a_strong_hold_keeps_what_is_masked_out_nearer_to_what_it_was(train, pictures, tmp_path):
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos, conditioning_data_dir=pictures.photo_masks))
    drifts = []
    for weight in (1e-6, 30):
        more = ("--mask_prior_weight", weight, "--max_train_steps", 8, "--learning_rate", "1e-2")
        run = train(config, *more, name=f"weight {weight}")
        drifts.append(np.mean(run.curve("loss/drift_outside")[-3:]))
    assert drifts[1] < 0.5 * drifts[0]
