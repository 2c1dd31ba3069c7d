import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import CheckpointError
from library.models.checkpoint import build_on_meta, load_onto, open_tensors, write_safetensors
from library.models.sd import Sd
from tests.tiny_models import tiny_sd15, tiny_sd15_folder, tiny_sd21, tiny_sd21_folder


@pytest.fixture
def tensors():
    return load_file(tiny_sd15())


def load(path, **family):
    return Sd(**family).load(str(path), None, torch.float32)


def states(parts):
    modules = (parts.denoiser, *parts.text_encoders, parts.vae)
    return [{name: tensor.flatten() for name, tensor in module.state_dict().items()} for module in modules]


def same(first, second):
    return all(
        one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        for one, two in zip(states(first), states(second), strict=True)
    )


def test_a_ckpt_with_a_nested_state_dict_loads_like_safetensors(tensors, tmp_path):
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 10}, tmp_path / "model.ckpt")
    assert same(load(tmp_path / "model.ckpt"), load(tiny_sd15()))


def test_a_ckpt_in_torchs_old_format_loads_too(tensors, tmp_path):
    torch.save(tensors, tmp_path / "model.ckpt", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "model.ckpt"), load(tiny_sd15()))


def test_the_diffusers_folder_of_a_model_loads_the_same_weights():
    assert same(load(tiny_sd15_folder()), load(tiny_sd15()))
    assert same(load(tiny_sd21_folder(), v2=True), load(tiny_sd21(), v2=True))


def test_a_folder_written_by_transformers_5_without_text_model_names_loads_the_same(tmp_path):
    folder = tiny_sd15_folder()
    for part in ("unet", "vae", "model_index.json"):
        (tmp_path / part).symlink_to(folder / part)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").symlink_to(folder / "text_encoder" / "config.json")
    flat = load_file(folder / "text_encoder" / "model.safetensors")
    flat = {name.removeprefix("text_model."): tensor for name, tensor in flat.items()}
    save_file(flat, tmp_path / "text_encoder" / "model.safetensors")
    assert same(load(tmp_path), load(tiny_sd15()))


def test_an_old_text_encoder_without_text_model_names_loads(tensors, tmp_path):
    short = {name.replace(".transformer.text_model.", ".transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "model.safetensors")
    assert same(load(tmp_path / "model.safetensors"), load(tiny_sd15()))


def test_surplus_tensors_are_ignored(tensors, tmp_path):
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.decay"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(load(tmp_path / "model.safetensors"), load(tiny_sd15()))


def test_the_vae_may_be_the_files_a_bare_file_a_folder_or_one_with_older_names(tensors, tmp_path):
    bare = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("first_stage_model.")
    }
    save_file(bare, tmp_path / "bare.safetensors")
    older = load_file(tiny_sd15_folder() / "vae" / "diffusion_pytorch_model.safetensors")
    renamed = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    for new, old in renamed:
        older = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in older.items()}
    save_file(older, tmp_path / "older.safetensors")
    places = ("bare.safetensors", "older.safetensors")
    expected = load(tiny_sd15()).vae.state_dict()
    for vae in (
        *(tmp_path / place for place in places),
        tiny_sd15(),
        tiny_sd15_folder(),
        tiny_sd15_folder() / "vae",
    ):
        found = Sd().load(str(tiny_sd15()), str(vae), torch.float32).vae.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), vae


def test_weights_are_cast_while_loading_and_the_vae_may_differ():
    parts = Sd().load(str(tiny_sd15()), None, torch.bfloat16, torch.float32)
    assert {parameter.dtype for parameter in parts.denoiser.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in parts.text_encoders[0].parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in parts.vae.parameters()} == {torch.float32}


def test_each_weight_of_a_large_layer_is_cast_to_its_own_place():
    weights = {f"{number}.weight": torch.full((3, 2), number, dtype=torch.float16) for number in range(50)}
    module = build_on_meta(lambda: torch.nn.Sequential(*(torch.nn.Linear(2, 3, bias=False) for _ in range(50))))
    load_onto(module, weights.items(), torch.bfloat16, "a file", "layers", in_float32={"7.weight"})
    assert all(torch.equal(layer.weight, torch.full((3, 2), number)) for number, layer in enumerate(module))
    assert {layer.weight.dtype for layer in module} == {torch.bfloat16, torch.float32}
    assert module[7].weight.dtype == torch.float32


def test_only_a_few_tensors_of_the_file_are_in_memory_beside_the_model():
    alive, most = weakref.WeakSet(), 0

    def tensors():
        nonlocal most
        for number in range(50):
            tensor = torch.zeros(3, 2, dtype=torch.float16)
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"{number}.weight", tensor

    module = build_on_meta(lambda: torch.nn.Sequential(*(torch.nn.Linear(2, 3, bias=False) for _ in range(50))))
    load_onto(module, tensors(), torch.bfloat16, "a file", "layers")
    assert 1 <= most <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16])
@pytest.mark.parametrize("is_mapped", [True, False])
def test_rows_of_a_file_are_those_of_the_whole_tensor(tmp_path, dtype, is_mapped):
    stored = {"first": torch.zeros(5), "grid": torch.arange(24).reshape(6, 2, 2).to(dtype)}
    save_file(stored, tmp_path / "model.safetensors")
    file = open_tensors(tmp_path / "model.safetensors", is_mapped=is_mapped)
    found = file.rows("grid", 2, 5)
    assert found.dtype == dtype
    assert torch.equal(found.to(torch.float32), stored["grid"].to(torch.float32)[2:5])


def test_rows_are_copies_that_keep_nothing_of_the_file_mapped(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"grid": torch.ones(6, 2)}, path)
    rows = open_tensors(path).rows("grid", 0, 6)
    with path.open("r+b") as file:
        file.seek(-48, 2)
        file.write(bytes(48))
    assert torch.equal(rows, torch.ones(6, 2))


def test_loaded_models_are_frozen_and_in_eval_mode():
    parts = load(tiny_sd15_folder())
    for module in (parts.denoiser, *parts.text_encoders, parts.vae):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def error_of(path, **family):
    with pytest.raises(CheckpointError) as caught:
        load(path, **family)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path):
    assert error_of(tmp_path / "none.safetensors") == f"{tmp_path / 'none.safetensors'}: no such file. Check the path."


def test_a_name_that_is_neither_file_folder_nor_on_the_hub_says_so():
    assert "neither a file nor a folder" in error_of("nobody/no-such-model")


def test_an_empty_folder_is_refused(tmp_path):
    assert "not a diffusers model folder" in error_of(tmp_path)


def test_half_a_download_is_called_unreadable(tmp_path):
    (tmp_path / "half.safetensors").write_bytes(tiny_sd15().read_bytes()[:100_000])
    assert "not a readable safetensors file" in error_of(tmp_path / "half.safetensors")
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 and so on")
    assert "fetch it again" in error_of(tmp_path / "half.ckpt")


def test_a_ckpt_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "callback": CheckpointError("any class of ours")}, tmp_path / "code.ckpt")
    assert "could run code" in error_of(tmp_path / "code.ckpt")


def test_missing_tensors_are_counted_and_three_are_named(tensors, tmp_path):
    missing = sorted(name for name in tensors if ".input_blocks.2.1.transformer_blocks." in name)
    assert len(missing) == 20
    save_file({name: tensors[name] for name in tensors.keys() - set(missing)}, tmp_path / "model.safetensors")
    message = error_of(tmp_path / "model.safetensors")
    assert "20 of 686 U-Net tensors are missing" in message
    assert message.count("input_blocks.2.1.transformer_blocks") == 3


def test_a_unet_without_its_first_blocks_is_called_incomplete(tensors, tmp_path):
    kept = {name: tensor for name, tensor in tensors.items() if ".input_blocks.1." not in name}
    save_file(kept, tmp_path / "model.safetensors")
    assert "The file is incomplete" in error_of(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("first_stage_model.decoder.mid.block_1.conv1.weight", "VAE"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "text encoder"),
    ],
)
def test_one_missing_tensor_is_named_as_the_file_would_name_it(tensors, tmp_path, name, part):
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    message = error_of(tmp_path / "model.safetensors")
    assert f"{part} tensors are missing (first: " in message
    assert name.split(".", 2)[2].removeprefix("text_model.") in message


def test_a_misshapen_tensor_is_named_with_both_shapes(tensors, tmp_path):
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    tensors[name] = torch.zeros(7, 64, 3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "mid_block.resnets.0.conv1.weight is [7, 64, 3, 3], expected [64, 64, 3, 3]" in error_of(
        tmp_path / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "sdxl_train_network.py"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "sd3_train_network.py"),
    ],
)
def test_a_file_of_another_family_names_the_right_script(tensors, tmp_path, name, script):
    save_file(tensors | {name: torch.zeros(1)}, tmp_path / "other.safetensors")
    assert script in error_of(tmp_path / "other.safetensors")


def test_a_folder_of_another_family_names_the_right_script(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}', encoding="utf-8")
    assert "sdxl_train_network.py" in error_of(tmp_path)


def test_a_lora_file_is_recognised(tmp_path):
    save_file({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    assert "is a LoRA file" in error_of(tmp_path / "lora.safetensors")


def test_an_inpainting_model_is_recognised(tensors, tmp_path):
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(64, 9, 3, 3)
    save_file(tensors, tmp_path / "inpainting.safetensors")
    assert "takes 9 channels, expected 4" in error_of(tmp_path / "inpainting.safetensors")


def test_v2_must_be_said_for_sd2_and_only_for_sd2():
    for file in (tiny_sd21(), tiny_sd21_folder()):
        assert "Add --v2" in error_of(file)
    for file in (tiny_sd15(), tiny_sd15_folder()):
        assert "Leave out --v2" in error_of(file, v2=True)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(2)}, {"key": "value"})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_safetensors(tmp_path / "model.safetensors" / "inside.safetensors", {"a": torch.zeros(2)})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "value"}
        assert torch.equal(file.get_tensor("a"), torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
