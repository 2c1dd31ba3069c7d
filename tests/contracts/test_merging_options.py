"""The commands for LoRA files are a contract: sd-scripts' options keep their names, kinds and defaults here."""

from typing import Any

import pytest

from library.options.declare import declared
from networks import (
    check_lora_weights,
    extract_lora_from_models,
    merge_lora,
    resize_lora,
    sd3_merge_lora,
    sdxl_merge_lora,
    svd_merge_lora,
)
from tools import merge_sd3_safetensors

PRECISIONS = {"precision": "float", "save_precision": None, "no_metadata": False}
REFERENCE: dict[type, dict[str, Any]] = {
    merge_lora.MergeOptions: {
        **PRECISIONS, "v2": False, "sd_model": None, "save_to": None, "models": None, "ratios": None, "concat": False,
        "shuffle": False,
    },
    sdxl_merge_lora.SdxlMergeOptions: {
        **PRECISIONS, "sd_model": None, "save_to": None, "models": None, "ratios": None, "lbws": None, "concat": False,
        "shuffle": False,
    },
    sd3_merge_lora.Sd3MergeOptions: {  # there is none in sd-scripts; these are merge_lora's and flux_merge_lora's
        **PRECISIONS, "sd_model": None, "save_to": None, "models": None, "ratios": None, "concat": False,
        "shuffle": False, "clip_l": None, "clip_l_save_to": None, "clip_g": None, "clip_g_save_to": None,
        "t5xxl": None, "t5xxl_save_to": None,
    },
    merge_sd3_safetensors.PackOptions: {
        "dit": None, "vae": None, "clip_l": None, "clip_g": None, "t5xxl": None, "output": "merged_model.safetensors",
        "device": None, "save_precision": None,
    },
    svd_merge_lora.SvdMergeOptions: {
        **PRECISIONS, "save_to": None, "models": None, "ratios": None, "lbws": None, "new_rank": 4,
        "new_conv_rank": None, "device": None,
    },
    extract_lora_from_models.ExtractOptions: {
        "v2": False, "v_parameterization": False, "load_precision": None, "save_precision": None, "model_org": None,
        "model_tuned": None, "save_to": None, "dim": 4, "conv_dim": None, "device": None, "clamp_quantile": 0.99,
        "min_diff": 0.01, "no_metadata": False, "sdxl": False,
        "load_original_model_to": None, "load_tuned_model_to": None,
    },
    resize_lora.ResizeOptions: {
        "save_precision": None, "new_rank": 4, "new_conv_rank": None, "save_to": None, "model": None, "device": None,
        "verbose": False, "dynamic_method": None, "dynamic_param": None,
    },
    check_lora_weights.CheckOptions: {"file": None, "show_all_keys": False},
}  # fmt: skip
ON_PURPOSE = {"clamp_quantile": 1.0}  # 0.99 moves the result away from the best one


@pytest.mark.parametrize("group", REFERENCE, ids=lambda group: group.__name__)
def test_options_and_defaults_are_those_of_the_reference(group):
    wanted = {name: ON_PURPOSE.get(name, default) for name, default in REFERENCE[group].items()}
    assert {each.name: each.default for each in declared(group)} == wanted


def test_several_files_and_numbers_may_follow_one_option():
    lists = {each.name for group in REFERENCE for each in declared(group) if each.is_list}
    assert lists == {"models", "ratios", "lbws"}
