import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import CheckpointError, OptionError
from networks import files, lora, merging
from networks.layers import Dropout, LoraLayer

DATA = Path(__file__).resolve().parents[1] / "data" / "networks"


def make(small, dim=4, alpha=1.0, **arguments):
    return lora.create_network(1.0, dim, alpha, None, None, None, targets=small.targets(), **arguments)


def attach_both(network):
    network.apply_to(None, None, True, True)
    return network


def test_without_conv_dim_the_resnets_are_left_alone(small):
    assert {layer.target.kind for layer in make(small).layers} == {"attention"}


def test_with_conv_dim_larger_kernels_get_their_own_rank_and_alpha(small):
    network = make(small, conv_dim="2", conv_alpha="0.5")
    by_kind = {layer.target.kind: layer for layer in network.layers}
    assert (by_kind["resnet"].rank, by_kind["resnet"].scale) == (2, 0.25)
    assert (by_kind["attention"].rank, by_kind["attention"].scale) == (4, 0.25)


def test_a_linear_in_a_resnet_gets_network_dim(target):
    time_emb, conv = nn.Linear(4, 4), nn.Conv2d(4, 4, 3)
    targets = [target(time_emb, "lora_unet_down_blocks_0_resnets_0_time_emb_proj", "resnet", 1)]
    targets.append(target(conv, "lora_unet_down_blocks_0_resnets_0_conv1", "resnet", 1))
    network = lora.create_network(1.0, 4, 1.0, None, None, None, targets=targets, conv_dim="2")
    assert [layer.rank for layer in network.layers] == [4, 2]


def test_a_network_with_convolutions_leaves_the_next_one_without(small):
    make(small, conv_dim="2")
    lora.create_network_from_weights(
        1.0, None, None, None, None, make(small, conv_dim=2).state_dict(), targets=small.targets()
    )
    assert {layer.target.kind for layer in make(small).layers} == {"attention"}


def test_detaching_leaves_the_base_output_bit_equal(small, trained):
    x = torch.randn(2, 8, 4, 4)
    plain = small(x)
    network = make(small, conv_dim=2)
    trained(network)
    with network.attached():
        assert not torch.allclose(small(x), plain)
    assert torch.equal(small(x), plain)


def test_the_context_detaches_after_an_error(small):
    network = make(small)
    with pytest.raises(ZeroDivisionError), network.attached():
        raise ZeroDivisionError
    assert not any("forward" in module.__dict__ for module in small.modules())


def test_a_part_that_is_not_applied_is_not_in_the_file_either(small):
    network = make(small)
    network.apply_to(None, None, apply_text_encoder=False, apply_unet=True)
    assert all(name.startswith("lora_unet_") for name in network.state_dict())
    assert not any("forward" in layer.__dict__ for layer in small.text)


def test_saved_and_loaded_weights_give_the_same_output(small, trained, tmp_path):
    x = torch.randn(2, 8, 4, 4)
    network = attach_both(make(small, conv_dim=2, conv_alpha=1))
    trained(network)
    expected = small(x)
    for suffix in (".safetensors", ".pt", ".ckpt"):
        network.save_weights(tmp_path / f"a{suffix}", None, {"ss_network_dim": "4"})
    network.detach()
    for suffix in (".safetensors", ".pt", ".ckpt"):
        loaded, tensors = lora.create_network_from_weights(
            1.0, tmp_path / f"a{suffix}", None, None, None, targets=small.targets()
        )
        loaded.load_weights(tmp_path / f"a{suffix}")
        with loaded.attached():
            assert torch.equal(small(x), expected)
        assert list(loaded.state_dict()) == list(network.state_dict())
        assert tensors.keys() == network.state_dict().keys()


def test_a_file_is_written_in_the_asked_type_with_its_metadata(small, tmp_path):
    from safetensors import safe_open

    make(small).save_weights(tmp_path / "a.safetensors", torch.float16, {"ss_network_dim": "4"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "4"
        assert len(file.metadata()["sshs_model_hash"]) == 64
        assert {file.get_slice(name).get_dtype() for name in make(small).state_dict()} == {"F16"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(small, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        make(small).save_weights(path, None, {"ss_network_dim": 4})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_alpha_of_a_file_replaces_that_of_the_options(small, tmp_path):
    make(small, alpha=8.0).save_weights(tmp_path / "a.safetensors", None, None)
    network = make(small, alpha=1.0)
    network.load_weights(tmp_path / "a.safetensors")
    assert {layer.scale for layer in network.layers} == {2.0}


def test_a_file_of_another_rank_is_refused_by_name(small, tmp_path):
    make(small, dim=8).save_weights(tmp_path / "a.safetensors", None, None)
    with pytest.raises(
        CheckpointError, match=r"lora_down.weight is \(8, 8\), this network's is \(4, 8\).*dim_from_weights"
    ):
        make(small, dim=4).load_weights(tmp_path / "a.safetensors")


def test_unknown_and_missing_names_are_each_one_warning(small, tmp_path, caplog):
    tensors = make(small).state_dict()
    lost = next(iter(tensors))
    tensors = {f"x.{name}" if name == lost else name: tensor for name, tensor in tensors.items()}
    files.write(tmp_path / "a.safetensors", tensors, None, None)
    with caplog.at_level(logging.WARNING):
        make(small).load_weights(tmp_path / "a.safetensors")
    assert [f"x.{lost}" in caplog.messages[0], f": {lost}" in caplog.messages[1], len(caplog.messages)] == [
        True,
        True,
        2,
    ]


def test_a_file_for_something_else_is_refused(small, tmp_path):
    files.write(tmp_path / "a.safetensors", {"model.weight": torch.ones(2)}, None, None)
    with pytest.raises(CheckpointError, match="none of its names belongs to this network"):
        make(small).load_weights(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"networks\.lora cannot read it"):
        lora.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, None, None, targets=small.targets())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_or_missing_file_is_a_users_error(small, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(CheckpointError, match="there is no such"):
        make(small).load_weights(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        make(small).load_weights(path)


def test_linear_weights_load_into_a_point_convolution_and_back(small, trained, tmp_path):
    network = make(small)
    trained(network)
    tensors = network.state_dict()
    other = {
        name: tensor if tensor.dim() == 0 else tensor.flatten(1) if tensor.dim() == 4 else tensor[:, :, None, None]
        for name, tensor in tensors.items()
    }
    files.write(tmp_path / "a.safetensors", other, None, None)
    loaded, _ = lora.create_network_from_weights(
        1.0, tmp_path / "a.safetensors", None, None, None, targets=small.targets()
    )
    loaded.load_weights(tmp_path / "a.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())


def test_a_network_from_weights_covers_what_the_file_has(small):
    tensors = {name: tensor for name, tensor in make(small, dim=3, alpha=6).state_dict().items() if "proj_in" in name}
    network, _ = lora.create_network_from_weights(1.0, None, None, None, None, tensors, targets=small.targets())
    assert {(layer.rank, layer.scale) for layer in network.layers} == {(3, 2.0)}
    assert list(network.state_dict()) == list(tensors)


def test_a_file_without_alpha_has_full_strength(small):
    tensors = {name: tensor for name, tensor in make(small).state_dict().items() if not name.endswith("alpha")}
    network, _ = lora.create_network_from_weights(1.0, None, None, None, None, tensors, targets=small.targets())
    assert {layer.scale for layer in network.layers} == {1.0}


def test_a_network_for_inference_neither_learns_nor_drops(small):
    tensors = make(small).state_dict()
    network, _ = lora.create_network_from_weights(
        1.0, None, None, None, None, tensors, for_inference=True, targets=small.targets()
    )
    assert not network.training
    assert not network.get_trainable_params()


def test_ranks_beside_a_file_are_warned_about(small, caplog):
    tensors = make(small).state_dict()
    lora.create_network_from_weights(1.0, None, None, None, None, tensors, targets=small.targets(), conv_dim="4")
    assert "conv_dim not used" in caplog.text


def test_merging_equals_the_forward(small, trained):
    x = torch.randn(2, 8, 4, 4)
    network = make(small, conv_dim=2)
    trained(network)
    network.set_multiplier(0.7)
    with network.attached():
        expected = small(x)
    network.merge_to(None, None, network.state_dict())
    torch.testing.assert_close(small(x), expected, atol=1e-5, rtol=1e-5)


def tiny_targets(reference, target):
    """The reference's tiny models as bare modules."""
    targets = []
    for prefix, part in (("lora_te", "te"), ("lora_unet", "unet")):
        for key in [key for key in reference if key.startswith(f"tiny/{part}/") and key.endswith(".weight")]:
            path = key.removeprefix(f"tiny/{part}/").removesuffix(".weight")
            weight = reference[key].clone()
            out, into, *kernel = weight.shape
            module = nn.Conv2d(into, out, kernel[0]) if kernel else nn.Linear(into, out)
            module.weight = nn.Parameter(weight, requires_grad=False)
            targets.append(target(module, f"{prefix}_{path.replace('.', '_')}"))
    return targets


def tiny_lora(reference):
    return {key.removeprefix("tiny/lora/"): value for key, value in reference.items() if key.startswith("tiny/lora/")}


def test_merged_weights_are_the_references(reference, target):
    targets = tiny_targets(reference, target)
    network, tensors = lora.create_network_from_weights(
        0.7, None, None, None, None, tiny_lora(reference), targets=targets
    )
    network.merge_to(None, None, tensors, torch.float32, "cpu")
    merged = {
        f"{prefix}_{key.split('/')[-1].removesuffix('.weight').replace('.', '_')}": value
        for prefix, part in (("lora_te", "te"), ("lora_unet", "unet"))
        for key, value in reference.items()
        if key.startswith(f"tiny/{part}_merged0.7/") and key.endswith(".weight")
    }
    assert len(merged) == len(targets)
    for one in targets:
        torch.testing.assert_close(one.module.weight.data, merged[one.name], atol=1e-6, rtol=1e-6)


def test_merging_into_half_precision_weights_rounds_once(target):
    base = nn.Linear(8, 8).to(torch.bfloat16).requires_grad_(False)
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    expected = (base.weight.float() + 0.5 * up @ down).to(torch.bfloat16)
    tensors = {
        "lora_unet_x.lora_down.weight": down,
        "lora_unet_x.lora_up.weight": up,
        "lora_unet_x.alpha": torch.tensor(2.0),
    }
    network, _ = lora.create_network_from_weights(1.0, None, None, None, None, tensors, targets=[target(base)])
    network.merge_to(None, None, tensors)
    assert torch.equal(base.weight, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_tensors_are_those_of_the_references_file(dtype, reference, target, tmp_path):
    network, tensors = lora.create_network_from_weights(
        1.0, None, None, None, None, tiny_lora(reference), targets=tiny_targets(reference, target)
    )
    network.load_state_dict(tensors)
    network.save_weights(tmp_path / "a.safetensors", dtype, None)
    theirs = files.read(DATA / f"lora_tiny_{'fp16' if dtype == torch.float16 else 'bf16'}.safetensors")
    ours = files.read(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) and value.dtype == dtype for name, value in ours.items())


def test_a_step_reads_no_value_off_the_device(small):
    # On the meta device there is none to read: whatever would wait for an accelerator raises here.
    network = make(small, conv_dim=2, rank_dropout=0.1, module_dropout=0.1, dropout=0.1).to("meta")
    small.to("meta")
    with network.attached():
        small(torch.empty(2, 8, 4, 4, device="meta")).square().mean().backward()
    measured = network.apply_max_norm_regularization(1.0)
    assert all(value.is_meta for value in measured)


@pytest.mark.parametrize(("limit", "name"), [(0.2, "0.2"), (1.0, "1"), (3.0, "3"), (100.0, "100")])
def test_limited_norms_are_the_references(limit, name, reference, target, read_json):
    network, tensors = lora.create_network_from_weights(
        1.0, None, None, None, None, tiny_lora(reference), targets=tiny_targets(reference, target)
    )
    network.load_state_dict(tensors)
    scaled, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    expected = read_json("lora_forward.json.gz")["max_norm"][name]
    assert int(scaled) == expected["keys_scaled"]
    assert float(mean) == pytest.approx(expected["mean_norm"], rel=1e-5)
    assert float(largest) == pytest.approx(expected["max_norm"], rel=1e-5)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, reference[f"max_norm/{name}/{key}"], atol=1e-6, rtol=1e-5)


def test_a_norm_below_the_limit_is_left_bit_for_bit(small):
    network = make(small)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    scaled, mean, largest = network.apply_max_norm_regularization(1.0)
    assert (int(scaled), float(mean), float(largest)) == (0, 0.0, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_the_norm_of_an_update_equals_that_of_the_full_product(kernel):
    torch.manual_seed(0)
    down, up = torch.randn(4, 24, *kernel), torch.randn(20, 4, *(1,) * len(kernel))
    full = merging.delta(down, up, torch.Size((20, 24, *kernel)))
    assert float(merging.delta_norm(down, up)) == pytest.approx(float(full.norm()), rel=1e-5)


def test_the_update_of_a_convolution_is_the_composition_of_both(target, trained):
    layer = LoraLayer(target(nn.Conv2d(6, 5, 3, bias=False)), 2, 2.0, Dropout())
    trained(layer)
    x = torch.randn(1, 6, 8, 8)
    delta = merging.delta(layer.lora_down.weight, layer.lora_up.weight, torch.Size((5, 6, 3, 3)))
    torch.testing.assert_close(nn.functional.conv2d(x, delta), layer.lora_up(layer.lora_down(x)), atol=1e-5, rtol=1e-5)


def test_checkpointed_blocks_get_the_same_gradients_with_dropout(small, trained, gradients):
    network = make(small, rank_dropout="0.3", module_dropout="0.3", dropout="0.2")
    trained(network)
    plain, recomputed = (gradients(network, is_checkpointed=each) for each in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_network_of_rank_zero_everywhere_is_refused(small):
    zeros = ",".join(["0"] * 25)
    targets = [one for one in small.targets() if one.group == "unet"]
    with pytest.raises(OptionError, match="no module to train"):
        lora.create_network(1.0, 4, 1.0, None, None, None, targets=targets, block_dims=zeros)
