from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import CheckpointError
from library.models import mmdit
from library.models.checkpoint import open_tensors
from library.models.family import LoraTarget
from networks import lora_sd3
from networks.files import StoredModule, modules_in
from networks.layers import Dropout, LoraLayer
from networks.network import LoraNetwork
from networks.split_qkv import SplitQkvLayer, fused, is_qkv, parted
from tests.lora_samples import delta
from tests.models.mmdit_models import reference_tiny
from tests.networks.sd3_parts import narrow_targets

DATA = Path(__file__).resolve().parents[1] / "data" / "networks"
QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


def make(targets=None, rank=2, alpha=1.0, **arguments) -> LoraNetwork:
    chosen = narrow_targets() if targets is None else targets
    return lora_sd3.create_network(1.0, rank, alpha, None, None, None, targets=chosen, split_qkv="True", **arguments)


def qkv_of(network: LoraNetwork) -> LoraLayer:
    return next(layer for layer in network.layers if layer.target.name == QKV)


@pytest.fixture(scope="module")
def numbers():
    with np.load(DATA / "sd3_lora_forward.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def base_of(numbers, kind: str) -> nn.Linear:
    weight, bias = numbers[f"sd3/{kind}/qkv_weight"], numbers[f"sd3/{kind}/qkv_bias"]
    base = nn.Linear(weight.shape[1], weight.shape[0])
    base.load_state_dict({"weight": weight, "bias": bias})
    return base.requires_grad_(False)


def layer_of(numbers, kind: str) -> tuple[nn.Linear, LoraLayer]:
    """Return a qkv and its layer with the reference's weights, at the strength that it trained them with."""
    base = base_of(numbers, kind)
    down, up, alpha = (numbers[f"sd3/{kind}/file/{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha"))
    is_split = kind == "split"
    rank = down.shape[0] // (3 if is_split else 1)
    maker = SplitQkvLayer if is_split else LoraLayer
    layer = maker(LoraTarget(QKV, base, "unet", "attention", 0), rank, float(alpha), Dropout())
    # sd-scripts wrote alpha as it was; here it is three times that, which is the layer's own already.
    layer.load_state_dict({"lora_down.weight": down, "lora_up.weight": up, "alpha": layer.alpha})
    return base, layer


@pytest.mark.parametrize("kind", ["fused", "split"])
def test_the_output_is_the_references(kind: str, numbers) -> None:
    base, layer = layer_of(numbers, kind)
    layer.attach()
    torch.testing.assert_close(base(numbers[f"sd3/{kind}/x"]), numbers[f"sd3/{kind}/y"], atol=2e-6, rtol=1e-5)


def test_the_references_names_and_shapes_are_ours(numbers) -> None:
    _, layer = layer_of(numbers, "split")
    saved = layer.state_dict()
    assert list(saved) == ["lora_down.weight", "lora_up.weight", "alpha"]
    assert torch.equal(saved["lora_up.weight"], numbers["sd3/split/file/lora_up.weight"])
    assert torch.equal(saved["lora_down.weight"], numbers["sd3/split/file/lora_down.weight"])


def test_a_reader_of_the_saved_file_gets_the_trained_strength(trained, tmp_path: Path) -> None:
    network = make()
    trained(network)
    layer = qkv_of(network)
    x = torch.randn(2, 5, 8)
    with network.attached():
        change = layer.target.module(x)
    change = change - layer.target.module(x)
    network.save_weights(tmp_path / "split.safetensors", None, None)
    stored = modules_in(load_file(tmp_path / "split.safetensors"), "file")[QKV]
    assert (stored.rank, stored.alpha) == (6, 3.0)
    torch.testing.assert_close(x.double() @ delta(stored).T, change.double(), atol=1e-5, rtol=1e-4)


def test_the_three_pairs_see_only_their_own_outputs(trained) -> None:
    network = make()
    trained(network)
    stored = qkv_of(network).state_dict()["lora_up.weight"]
    for part in range(3):
        rows = stored[8 * part : 8 * part + 8]
        assert bool((rows[:, 2 * part : 2 * part + 2] != 0).all())
        assert int((rows != 0).sum()) == 8 * 2


def test_only_qkv_are_split() -> None:
    kinds = {type(layer) for layer in make().layers if not is_qkv(layer.target)}
    assert kinds == {LoraLayer}
    split = [layer.target.name for layer in make().layers if isinstance(layer, SplitQkvLayer)]
    assert len(split) == 7  # two sides of three blocks, and one second attention
    assert any("attn2_qkv" in name for name in split)


def test_a_new_network_changes_nothing() -> None:
    network = make()
    layer, x = qkv_of(network), torch.randn(2, 5, 8)
    plain = layer.target.module(x)
    with network.attached():
        assert torch.equal(layer.target.module(x), plain)


def test_a_file_is_loaded_bit_for_bit(trained, tmp_path: Path) -> None:
    network, other = make(), make()
    trained(network)
    network.save_weights(tmp_path / "split.safetensors", None, None)
    other.load_weights(tmp_path / "split.safetensors")
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert {layer.scale for layer in other.layers} == {0.5}


def test_the_state_of_a_run_is_loaded_bit_for_bit(trained) -> None:
    network, other = make(), make()
    trained(network)
    other.load_state_dict(network.state_dict())
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_file_of_sd_scripts_goes_on_at_the_strength_it_was_trained_with(trained, tmp_path: Path, caplog) -> None:
    network, other = make(), make()
    trained(network)
    tensors = network.state_dict()
    as_there = {name: t / 3 if name.endswith("qkv.alpha") else t.contiguous() for name, t in tensors.items()}
    save_file(as_there, tmp_path / "theirs.safetensors")
    with caplog.at_level("INFO"):
        other.load_weights(tmp_path / "theirs.safetensors")
    assert {layer.scale for layer in other.layers} == {0.5}
    assert "stored at a third of the strength" in caplog.text


@pytest.mark.parametrize("factor", [1, 1 / 3])
def test_a_file_of_sd_scripts_is_told_of_where_it_stays_as_weak_as_it_is(factor: float, trained, caplog) -> None:
    network = make()
    trained(network)
    tensors = {n: t * factor if n.endswith("qkv.alpha") else t for n, t in network.state_dict().items()}
    made, _ = lora_sd3.create_network_from_weights(
        1.0, None, None, None, None, weights_sd=tensors, targets=narrow_targets()
    )
    made.load_state_dict(tensors)
    assert qkv_of(made).scale == pytest.approx(0.5 * factor)
    assert ("act with a third of the strength" in caplog.text) == (factor < 1)


def test_a_file_of_this_project_is_not_taken_for_one_of_sd_scripts(trained, tmp_path: Path, caplog) -> None:
    network, other = make(alpha=2.0), make()
    trained(network)
    network.save_weights(tmp_path / "split.safetensors", torch.float16, None)
    with caplog.at_level("INFO"):
        other.load_weights(tmp_path / "split.safetensors")
    assert "third" not in caplog.text
    assert {layer.scale for layer in other.layers} == {1.0}


def test_a_lora_that_is_not_split_is_refused_with_the_way_out(trained, tmp_path: Path) -> None:
    plain = lora_sd3.create_network(1.0, 6, 1.0, None, None, None, targets=narrow_targets())
    trained(plain)
    tensors = {name: tensor for name, tensor in plain.state_dict().items() if "qkv" in name}
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"plain\.safetensors: .*without split_qkv\. Leave split_qkv out"):
        make().load_weights(tmp_path / "plain.safetensors")


def test_a_network_shaped_by_a_split_file_has_one_fused_pair_and_says_what_it_does_not_use(
    trained, tmp_path: Path, caplog
) -> None:
    network = make()
    trained(network)
    path = tmp_path / "split.safetensors"
    network.save_weights(path, None, None)
    x = torch.randn(2, 5, 8)
    made, _ = lora_sd3.create_network_from_weights(
        1.0, path, None, None, None, targets=narrow_targets(), split_qkv="True"
    )
    made.load_weights(path)
    assert {type(layer) for layer in made.layers} == {LoraLayer}
    assert qkv_of(made).rank == 6
    assert "split_qkv not used" in caplog.text
    outputs = []
    for each in (network, made):
        with each.attached():
            outputs.append(qkv_of(each).target.module(x))
    torch.testing.assert_close(*outputs)


@torch.no_grad()
def test_rank_dropout_drops_ranks_of_each_of_the_three_alone_and_keeps_the_mean(trained) -> None:
    network = make(rank_dropout="0.5")
    trained(network)
    layer = qkv_of(network)
    x = torch.randn(1, 3, 8).expand(400, 3, 8)
    plain = layer.target.module(x)
    with network.attached():
        network.eval()
        whole = layer.target.module(x) - plain
        network.train()
        dropped = layer.target.module(x) - plain
    # Of two ranks of a part: none, one or both are left.
    for part in dropped.chunk(3, -1):
        lengths = part[:, 0].norm(dim=-1)
        assert 0.1 < float((lengths < 1e-7).float().mean()) < 0.4
    torch.testing.assert_close(dropped.mean(0), whole[0], atol=0.25 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("limit", [0.01, 1000.0])
def test_the_norm_that_is_limited_is_that_of_the_saved_update(limit: float, trained) -> None:
    network = make()
    trained(network)

    def norms() -> list[float]:
        stored = modules_in(network.state_dict(), "state")
        return [float(delta(StoredModule(m.down, m.up, m.alpha)).norm()) for m in stored.values()]

    before = norms()
    shrunk, _, largest = network.apply_max_norm_regularization(limit)
    wanted = [min(limit, norm) for norm in before]
    assert norms() == pytest.approx(wanted, rel=1e-4)
    assert int(shrunk) == sum(norm > limit for norm in before)
    assert float(largest) == pytest.approx(max(wanted), rel=1e-4)


def test_every_weight_of_a_split_layer_learns(trained) -> None:
    network = make(loraplus_lr_ratio="4")
    trained(network)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-3)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    layer = qkv_of(network)
    assert rates[id(layer.lora_down.weight)] == 1e-3
    assert rates[id(layer.lora_up.weight)] == 4e-3
    assert "unet plus" in names
    with network.attached():
        layer.target.module(torch.randn(2, 5, 8)).square().sum().backward()
    assert bool((layer.lora_down.weight.grad != 0).all())
    assert bool((layer.lora_up.weight.grad != 0).all())


def test_parting_a_fused_pair_and_fusing_it_again_gives_the_same() -> None:
    up = torch.randn(24, 2)
    assert torch.equal(parted(fused(up)), up)
    assert parted(torch.randn(24, 6)) is None


def test_the_references_network_has_the_references_output_on_a_whole_mmdit(numbers, tmp_path: Path) -> None:
    tensors, taken, plain = reference_tiny()
    save_file(tensors, tmp_path / "mmdit.safetensors")
    denoiser = mmdit.build(open_tensors(tmp_path / "mmdit.safetensors"), torch.float32)
    file = DATA / "sd3_tiny_lora.safetensors"
    network, _ = lora_sd3.create_network_from_weights(1.0, file, None, [], denoiser)
    network.load_weights(file)
    with network.attached(), torch.no_grad():
        found = denoiser(*taken)
    wanted = numbers["sd3/fused/mmdit_out"]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(wanted, plain, atol=1e-2)
