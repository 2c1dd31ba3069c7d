"""What saved files say about their making."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from library import metadata
from library.metadata import DatasetFacts, MaskFacts, RunFacts
from library.options.flow import FlowOptions
from library.options.groups import Options
from library.options.masks import MaskOptions
from library.options.metadata import MetadataOptions
from library.options.network import NetworkOptions
from library.options.saving import SavingOptions
from library.options.sd3 import Sd3Options

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "metadata" / "sd15_run.json").read_text(encoding="utf-8"))

PHOTOS = {"image_dir": "photos", "img_count": 6, "num_repeats": 5, "is_reg": False}
REG = {"image_dir": "reg", "img_count": 10, "num_repeats": 1, "is_reg": True}
DATASET = {
    "resolution": [512, 640],
    "enable_bucket": True,
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "bucket_info": {"buckets": {"0": {"resolution": [512, 640], "count": 40}}, "mean_img_ar_error": 0.1},
    "tag_frequency": {"photos": {"cat": 6}},
    "subsets": [PHOTOS, REG],
}


def facts(*datasets: dict, is_from_config: bool = True) -> DatasetFacts:
    return DatasetFacts(40, 10, 0, 25, 2, is_from_config, datasets or (DATASET,))


def run_facts(**changes: object) -> RunFacts:
    run = RunFacts(
        session_id=1,
        started_at=1795317061.6,
        seed=42,
        num_epochs=3,
        max_train_steps=10,
        optimizer="torch.optim.adamw.AdamW",
        base_model_version="sd_v1",
        network_dim=4,
        network_alpha=1.0,
        model_name="sd15.safetensors",
    )
    return replace(run, **changes)


def test_a_run_with_a_dataset_config_writes_the_keys_of_sd_scripts() -> None:
    ours = metadata.training_metadata(Options(), facts(), run_facts())
    ours = metadata.at_save(ours, step=10, epoch=3)
    # the base model's hashes come from their own thread
    theirs = {key for key in REFERENCE if key.startswith("ss_")} - {"ss_sd_model_hash", "ss_new_sd_model_hash"}
    assert set(ours) == {*theirs, "ss_masked_loss", "ss_alpha_mask"}


def test_defaults_are_written_as_sd_scripts_writes_them() -> None:
    ours = metadata.training_metadata(Options(), facts(), run_facts())
    same = [
        "ss_gradient_checkpointing",
        "ss_caption_dropout_rate",
        "ss_caption_dropout_every_n_epochs",
        "ss_noise_offset",
        "ss_clip_skip",
        "ss_max_token_length",
        "ss_huber_c",
        "ss_huber_schedule",
        "ss_loss_type",
        "ss_lr_warmup_steps",
        "ss_max_grad_norm",
        "ss_v2",
        "ss_multires_noise_discount",
        "ss_prior_loss_weight",
        "ss_min_snr_gamma",
        "ss_fp8_base",
        "ss_validation_split",
        "ss_mixed_precision",
        "ss_seed",
        "ss_network_alpha",
        "ss_lowram",
        "ss_face_crop_aug_range",
    ]
    assert {key: ours[key] for key in same} == {key: REFERENCE[key] for key in same}


def test_a_run_without_a_dataset_config_writes_plain_keys() -> None:
    ours = metadata.training_metadata(Options(), facts(is_from_config=False), run_facts())
    assert "ss_datasets" not in ours
    assert ours["ss_resolution"] == "(512, 640)"
    assert ours["ss_total_batch_size"] == "2"
    assert ours["ss_enable_bucket"] == "True"
    assert json.loads(ours["ss_dataset_dirs"]) == {"photos": {"n_repeats": 5, "img_count": 6}}
    assert json.loads(ours["ss_reg_dataset_dirs"]) == {"reg": {"n_repeats": 1, "img_count": 10}}
    assert json.loads(ours["ss_bucket_info"])["mean_img_ar_error"] == 0.1


def test_a_folder_used_twice_is_listed_twice_and_its_tags_once() -> None:
    second = {**DATASET, "subsets": [{**PHOTOS, "num_repeats": 2}], "tag_frequency": {"photos": {"cat": 99}}}
    ours = metadata.training_metadata(Options(), facts(DATASET, second), run_facts())
    dirs = json.loads(ours["ss_dataset_dirs"])
    assert {name: entry["n_repeats"] for name, entry in dirs.items()} == {"photos": 5, "photos (2)": 2}
    assert json.loads(ours["ss_tag_frequency"]) == {"photos": {"cat": 6}}


def test_every_value_is_text() -> None:
    run = run_facts(network_args={"conv_dim": "4"}, vae_name="vae.pt", extra={"ss_more": 1})
    for is_from_config in (True, False):
        ours = metadata.training_metadata(Options(), facts(is_from_config=is_from_config), run)
        assert all(isinstance(value, str) for value in ours.values())


def test_network_arguments_are_json_with_the_dropout() -> None:
    options = Options(network=NetworkOptions(network_dropout=0.25))
    ours = metadata.training_metadata(options, facts(), run_facts(network_args={"conv_dim": "4"}))
    assert json.loads(ours["ss_network_args"]) == {"dropout": 0.25, "conv_dim": "4"}


def test_a_model_file_is_named_without_its_folder_and_a_hub_id_in_full(tmp_path: Path) -> None:
    (tmp_path / "base.safetensors").touch()
    assert metadata.model_name(str(tmp_path / "base.safetensors")) == "base.safetensors"
    assert metadata.model_name("someone/some-model") == "someone/some-model"


def test_secrets_are_in_no_value() -> None:
    from library.options.logging import LoggingOptions

    options = Options(logging=LoggingOptions(wandb_api_key="very-secret"))
    ours = metadata.training_metadata(options, facts(), run_facts())
    ours |= metadata.modelspec(options.metadata, "sd_v1", "name")
    assert "very-secret" not in json.dumps(ours)


def test_the_minimum_is_what_a_loader_needs() -> None:
    ours = metadata.training_metadata(Options(), facts(), run_facts(network_args={"a": "b"}))
    ours |= metadata.modelspec(MetadataOptions(), "sd_v1", "name")
    small = metadata.minimum(ours)
    assert {key for key in small if key.startswith("ss_")} == set(metadata.KEPT_WITH_NO_METADATA)
    assert {key for key in small if key.startswith("modelspec.")} == {
        key for key in ours if key.startswith("modelspec.")
    }


def test_modelspec_of_a_plain_run_has_the_keys_of_sd_scripts() -> None:
    ours = metadata.modelspec(MetadataOptions(), "sd_v1", "mask")
    theirs = {key: value for key, value in REFERENCE.items() if key.startswith("modelspec.")}
    assert set(ours) == set(theirs)
    changing = {"modelspec.date", "modelspec.implementation_version"}
    assert {key: ours[key] for key in set(ours) - changing} == {key: theirs[key] for key in set(theirs) - changing}


def test_modelspec_takes_the_texts_of_the_options() -> None:
    options = MetadataOptions(metadata_title="Cat", metadata_author="Ann", metadata_trigger_phrase="sks")
    ours = metadata.modelspec(
        options, "sd_v2_v", "name", prediction_type="v_prediction", clip_skip=2, timestep_range=(0, 600)
    )
    assert ours["modelspec.title"] == "Cat"
    assert ours["modelspec.author"] == "Ann"
    assert ours["modelspec.trigger_phrase"] == "sks"
    assert ours["modelspec.resolution"] == "768x768"
    assert ours["modelspec.prediction_type"] == "v"
    assert ours["modelspec.encoder_layer"] == "2"
    assert ours["modelspec.timestep_range"] == "0,600"


@pytest.mark.parametrize("version", ["medium", "5-medium", "5-large"])
def test_modelspec_of_sd3_is_that_of_sd_scripts(version: str) -> None:
    ours = metadata.modelspec(MetadataOptions(), version, "name", prediction_type="flow")
    assert ours["modelspec.architecture"] == f"stable-diffusion-3-{version}/lora"
    assert ours["modelspec.implementation"] == "diffusers"
    assert ours["modelspec.resolution"] == "1024x1024"
    assert ours["modelspec.prediction_type"] == "epsilon"


def test_a_model_trained_on_a_flow_says_how_timesteps_were_drawn_and_text_was_masked() -> None:
    options = Options(
        flow=FlowOptions(weighting_scheme="mode", mode_scale=0.8, training_shift=3.0),
        sd3=Sd3Options(apply_t5_attn_mask=True),
    )
    run = run_facts(base_model_version="5-medium", extra=metadata.of_flow(options))
    written = metadata.training_metadata(options, facts(), run)
    assert {key: value for key, value in written.items() if key in metadata.of_flow(options)} == {
        "ss_apply_lg_attn_mask": "False",
        "ss_apply_t5_attn_mask": "True",
        "ss_weighting_scheme": "mode",
        "ss_logit_mean": "0.0",
        "ss_logit_std": "1.0",
        "ss_mode_scale": "0.8",
        "ss_training_shift": "3.0",
    }


def test_other_models_have_no_keys_of_a_flow() -> None:
    assert not set(metadata.FROM_OPTIONS_OF_FLOW) & set(metadata.training_metadata(Options(), facts(), run_facts()))


def test_a_file_without_a_name_gets_a_title_with_the_time() -> None:
    assert metadata.modelspec(MetadataOptions(), "sd_v1", None)["modelspec.title"].startswith("LoRA@1")


def test_a_thumbnail_file_becomes_a_data_url(tmp_path: Path) -> None:
    (tmp_path / "small.png").write_bytes(b"picture")
    assert metadata.thumbnail(str(tmp_path / "small.png")) == (
        "data:image/png;base64," + base64.b64encode(b"picture").decode()
    )


def test_a_thumbnail_url_stays_as_it_is() -> None:
    assert metadata.thumbnail("data:image/png;base64,AAAA") == "data:image/png;base64,AAAA"


def test_a_missing_thumbnail_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = MetadataOptions(metadata_thumbnail=str(tmp_path / "gone.png"))
    assert "modelspec.thumbnail" not in metadata.modelspec(options, "sd_v1", "name")
    assert "gone.png" in caplog.text


def test_each_save_has_its_own_step_and_epoch() -> None:
    saved = metadata.at_save({"ss_v2": "False"}, step=7, epoch=2)
    assert (saved["ss_steps"], saved["ss_epoch"], saved["ss_v2"]) == ("7", "2", "False")


def test_the_output_name_and_comment_come_from_the_saving_options() -> None:
    options = Options(saving=SavingOptions(output_name="cat", training_comment="first try"))
    ours = metadata.training_metadata(options, facts(), run_facts())
    assert (ours["ss_output_name"], ours["ss_training_comment"]) == ("cat", "first try")


def test_a_run_without_masks_says_so_and_nothing_else_of_masks() -> None:
    written = metadata.training_metadata(Options(), facts(), run_facts())
    assert {key: value for key, value in written.items() if "mask" in key} == {
        "ss_masked_loss": "False",
        "ss_alpha_mask": "False",
    }


def test_a_masked_run_tells_how_many_images_and_the_settings_of_the_command_line() -> None:
    options = Options(
        masks=MaskOptions(
            masked_loss=True,
            conditioning_data_dir="some/where/masks",
            mask_fill=("noise", "mean"),
            mask_area_norm=0.5,
            mask_drop_tags=("hat",),
            placement_scale="0.5,1.0",
        )
    )
    masks = MaskFacts(is_masked=True, has_alpha=True, num_images=12, mean_weight=0.43219)
    written = metadata.training_metadata(options, replace(facts(), masks=masks), run_facts())
    plain = metadata.training_metadata(Options(), facts(), run_facts())
    assert {key: value for key, value in written.items() if plain.get(key) != value} == {
        "ss_masked_loss": "True",
        "ss_alpha_mask": "True",
        "ss_num_masked_images": "12",
        "ss_mean_mask_weight": "0.4322",
        "ss_conditioning_data_dir": "masks",
        "ss_mask_fill": '["noise", "mean"]',
        "ss_mask_area_norm": "0.5",
        "ss_mask_drop_tags": '["hat"]',
    }
