import warnings

import pytest
import torch
from safetensors.torch import save_file

from library.models import block_swap, checkpointing, float8, mmdit_blocks
from library.models.checkpoint import open_tensors
from library.models.layout import mmdit as layout
from library.models.mmdit import build, original_tensors, timestep_features
from library.models.mmdit_files import diffusers_tensors
from tests.models.mmdit_models import CONTEXT, LAYOUTS, POOLED, SIDE, inputs, narrow, reference_tiny, tensors
from tests.models.reference import DATA, Shapes, base_keys

SIZES = {
    "square": {"height": 16, "width": 16},
    "upright, one": {"batch": 1, "height": 32, "width": 6},
    "wide, three, long text": {"batch": 3, "height": 4, "width": 20, "texts": 31},
}


def in_diffusers(denoiser, weights):
    """Return diffusers' model of the same sizes with these weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own
        from diffusers import SD3Transformer2DModel

    shape = denoiser.shape
    model = SD3Transformer2DModel(
        sample_size=SIDE,
        num_layers=shape.depth,
        num_attention_heads=shape.heads,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=shape.width,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=SIDE,
        dual_attention_layers=tuple(range(shape.num_dual)),
        qk_norm="rms_norm" if shape.has_qk_norm else None,
    )
    model.load_state_dict(weights)
    return model.eval()


# ---- beside diffusers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYOUTS)
def test_diffusers_own_conversion_gives_the_same_tensors(name):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    denoiser = narrow(name)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(original_tensors(denoiser))
    ours = diffusers_tensors(tensors(denoiser))
    assert ours.keys() == theirs.keys()
    assert [each for each in ours if not torch.equal(ours[each], theirs[each])] == []


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_the_output_is_that_of_diffusers_model(name):
    denoiser = narrow(name)
    theirs = in_diffusers(denoiser, diffusers_tensors(tensors(denoiser)))
    for size in SIZES.values():
        noisy, timesteps, context, pooled = inputs(**size)
        wanted = theirs(noisy, context, pooled, timesteps).sample
        assert wanted.std() > 0.5
        torch.testing.assert_close(denoiser(noisy, timesteps, context, pooled), wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_timesteps_are_told_as_diffusers_tells_them():
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.tensor([0, 1, 500, 999.5, 1000])
    wanted = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_features(timesteps), wanted, atol=1e-6, rtol=0)


# ---- beside the reference -----------------------------------------------------------------------------------------
def numbers(name):
    import numpy as np

    return {each: torch.from_numpy(array) for each, array in np.load(DATA / f"models/{name}.npz").items()}


def test_timesteps_are_told_as_the_reference_tells_them():
    wanted = numbers("sd3_positions")
    torch.testing.assert_close(timestep_features(wanted["temb/t"]), wanted["temb/out256"], atol=5e-5, rtol=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the reference's tiny MMDiT, read from a file, its inputs and the reference's output."""
    weights, taken, wanted = reference_tiny()
    path = tmp_path_factory.mktemp("tiny") / "mmdit.safetensors"
    save_file(weights, path)
    return build(open_tensors(path), torch.float32), taken, wanted


@torch.no_grad()
def test_the_references_tiny_model_gives_the_references_output(tiny):
    denoiser, taken, wanted = tiny
    torch.testing.assert_close(denoiser(*taken), wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_is_left_is_the_references_second_attention_with_heads_as_wide_as_there_are_heads(tiny, monkeypatch):
    denoiser, taken, wanted = tiny
    attend, calls = mmdit_blocks.attend, []

    def with_its_heads(*parts):
        calls.append(parts)
        if len(calls) == 1:  # the others are the joint attentions
            return attend(*(part.flatten(2).unflatten(-1, (-1, denoiser.shape.heads)) for part in parts))
        return attend(*parts)

    monkeypatch.setattr(mmdit_blocks, "attend", with_its_heads)
    torch.testing.assert_close(denoiser(*taken), wanted, atol=3e-6, rtol=0)


# ---- true size ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("architecture", "name", "depth", "heads", "num_dual", "side"),
    [
        ("sd3m", "medium", 24, 24, 0, 192),
        ("sd35m", "5-medium", 24, 24, 13, 384),
        ("sd35l", "5-large", 38, 38, 0, 192),
    ],
)
def test_a_real_checkpoints_names_and_shapes_come_out_as_they_went_in(architecture, name, depth, heads, num_dual, side):
    shapes = {each: shape for each, shape in base_keys(architecture).items() if each.startswith(layout.PREFIX)}
    denoiser = build(Shapes(shapes, layout.PREFIX), torch.bfloat16)
    shape = denoiser.shape
    assert (shape.name, shape.depth, shape.heads, shape.num_dual) == (name, depth, heads, num_dual)
    assert (shape.position_side, shape.context_width, shape.pooled_width) == (side, 4096, 2048)
    assert {each: list(tensor.shape) for each, tensor in original_tensors(denoiser).items()} == shapes


# ---- positions ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_window_at_the_middles_offset_is_the_middle_and_another_is_not():
    denoiser, taken = narrow(), inputs(height=12, width=16)
    middle = denoiser(*taken)
    assert torch.equal(denoiser(*taken, crop_offset=(0.5, 0.5)), middle)
    assert not torch.allclose(denoiser(*taken, crop_offset=(0.0, 0.5)), middle, atol=1e-3)
    assert not torch.allclose(denoiser(*taken, crop_offset=(0.5, 0.99)), middle, atol=1e-3)


@torch.no_grad()
def test_scaled_positions_take_the_place_of_the_table():
    denoiser, taken = narrow(), inputs(height=12, width=16)
    before = denoiser(*taken)
    denoiser.scale_positions([(128, 128)])
    assert not torch.allclose(denoiser(*taken), before, atol=1e-3)
    assert denoiser(*inputs(batch=1, height=40, width=16)).shape == (1, 16, 40, 16)  # larger than the table


# ---- fewer tokens -------------------------------------------------------------------------------------------------
KEPT = torch.tensor([[0, 5, 6, 13, 47], [1, 2, 3, 30, 31]])  # of 6 x 8 tokens


def kept_cells():
    """Return which cells (2, 1, 12, 16) the kept tokens cover."""
    cells = torch.zeros(2, 48).scatter(1, KEPT, 1.0).view(2, 1, 6, 8)
    return cells.repeat_interleave(2, 2).repeat_interleave(2, 3).bool()


@torch.no_grad()
def test_keeping_every_token_changes_nothing():
    denoiser, taken = narrow(), inputs()
    every = torch.arange(48).expand(2, -1)
    assert torch.equal(denoiser(*taken, kept_tokens=every), denoiser(*taken))


@torch.no_grad()
def test_the_output_is_nothing_where_tokens_are_left_out_and_something_where_not():
    output = narrow()(*inputs(), kept_tokens=KEPT)
    cells = kept_cells().expand_as(output)
    assert (output[~cells] == 0).all()
    assert (output[cells] != 0).all()


@torch.no_grad()
def test_kept_tokens_see_each_other_and_none_of_those_left_out():
    denoiser = narrow()
    noisy, *rest = inputs()
    expected = denoiser(noisy, *rest, kept_tokens=KEPT)
    elsewhere = torch.where(kept_cells(), noisy, noisy + 3)
    assert torch.equal(denoiser(elsewhere, *rest, kept_tokens=KEPT), expected)
    noisy[:, :, 0:2, 10:12] += 3  # token 5 of the first picture, none of the second
    first, second = (denoiser(noisy, *rest, kept_tokens=KEPT) - expected).abs()
    assert first[:, 10:12, 14:16].min() > 1e-4  # token 47
    assert second.max() == 0


def test_gradients_reach_the_kept_cells_and_no_others():
    denoiser = narrow()
    noisy, *rest = inputs()
    denoiser(noisy.requires_grad_(), *rest, kept_tokens=KEPT).square().sum().backward()
    cells = kept_cells().expand_as(noisy)
    assert (noisy.grad[cells] != 0).all()
    assert (noisy.grad[~cells] == 0).all()


# ---- memory and speed ---------------------------------------------------------------------------------------------
TRAINED = (
    "joint_blocks.0.context_block.attn.qkv",
    "joint_blocks.1.x_block.attn2.proj",
    "joint_blocks.2.x_block.mlp.fc1",
)


def trained(denoiser, **how):
    """Return the output and gradients of some weights."""
    weights = [denoiser.get_submodule(name).weight.requires_grad_() for name in TRAINED]
    output = denoiser(*inputs(), **how)
    output.square().mean().backward()
    return [output.detach(), *(weight.grad for weight in weights)]


@pytest.mark.parametrize("run", [None, checkpointing.offloaded], ids=["torch's", "offloaded"])
@pytest.mark.parametrize("how", [{}, {"kept_tokens": KEPT}], ids=["all tokens", "some"])
def test_gradient_checkpointing_changes_no_gradient(run, how):
    expected = trained(narrow(), **how)
    denoiser = narrow()
    denoiser.enable_gradient_checkpointing(run)
    for each, wanted in zip(trained(denoiser, **how), expected, strict=True):
        assert wanted.abs().max() > 0
        assert torch.equal(each, wanted)


def test_each_block_is_computed_twice_with_gradients_and_once_without():
    denoiser, calls = narrow(), []
    denoiser.joint_blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    denoiser.enable_gradient_checkpointing()
    with torch.no_grad():
        denoiser(*inputs())
    assert len(calls) == 1
    trained(denoiser)
    assert len(calls) == 3


def test_a_swap_is_told_of_every_block_before_and_after_it():
    denoiser, told = narrow(), []

    class Listener:
        def enter(self, index):
            told.append(("enter", index))

        def leave(self, index, *tensors):
            told.append(("leave", index))
            return tuple(None if each is None else each * 1 for each in tensors)

    for index, block in enumerate(denoiser.joint_blocks):
        block.register_forward_hook(lambda *_, index=index: told.append(("block", index)))
    expected = denoiser(*inputs())
    told.clear()
    denoiser.swap = Listener()
    assert torch.equal(denoiser(*inputs()), expected)
    assert told == [(each, index) for index in range(3) for each in ("enter", "block", "leave")]


@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_blocks_that_take_turns_on_the_device_give_the_same_gradients(is_checkpointed, is_float8):
    def gradients(num_swapped):
        denoiser = narrow(depth=5)
        if is_float8:
            float8.store(denoiser)
        if is_checkpointed:
            denoiser.enable_gradient_checkpointing()
        block_swap.install(denoiser, num_swapped, torch.device("cpu"))
        noisy, *rest = inputs()
        output = denoiser(noisy.requires_grad_(), *rest, kept_tokens=KEPT)
        output.square().mean().backward()
        return output.detach(), noisy.grad

    for each, wanted in zip(gradients(3), gradients(0), strict=True):
        assert torch.equal(each, wanted)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("is_checkpointed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_blocks_give_the_same_gradients_and_names(is_checkpointed):
    expected = trained(narrow())
    denoiser = narrow()
    names = list(denoiser.state_dict())
    if is_checkpointed:
        denoiser.enable_gradient_checkpointing()
    denoiser.compile_repeated_blocks(backend="aot_eager")
    torch.testing.assert_close(trained(denoiser), expected, atol=1e-5, rtol=1e-4)
    assert list(denoiser.state_dict()) == names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_blocks_of_every_kind_and_size_are_compiled():
    """By itself torch gives up after eight, and computes on without its compiler."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    denoiser = narrow()
    denoiser.compile_repeated_blocks(backend)
    for has_gradient in (True, False):
        for batch, height in ((2, 8), (2, 12), (1, 12)):
            with torch.set_grad_enabled(has_gradient):
                denoiser(*inputs(batch, height))
    kinds = len(graphs)
    denoiser(*inputs(2, 20))
    assert kinds == len(graphs) > 8


# ---- half precision -----------------------------------------------------------------------------------------------
def rounded(denoiser):
    for weight in denoiser.parameters():
        weight.data = weight.data.bfloat16().float()
    return denoiser


@torch.no_grad()
def test_bfloat16_weights_under_autocast_come_near_float32():
    wanted = rounded(narrow())(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        output = narrow().bfloat16()(*inputs())
    assert output.dtype == torch.bfloat16
    assert (output - wanted).square().mean().sqrt() < 0.03 * wanted.std()


@torch.no_grad()
def test_inputs_fit_weights_of_another_format_without_autocast():
    wanted = rounded(narrow())(*inputs())
    output = narrow().bfloat16()(*inputs())
    assert (output - wanted).square().mean().sqrt() < 0.03 * wanted.std()


@torch.no_grad()
def test_the_tokens_stay_in_half_precision_from_block_to_block():
    denoiser, formats = narrow().bfloat16(), set()
    for module in denoiser.modules():
        if isinstance(module, mmdit_blocks.JointBlock | torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, taken: formats.update(each.dtype for each in taken))
    with torch.autocast("cpu", torch.bfloat16):
        denoiser(*(each.bfloat16() if each.is_floating_point() else each for each in inputs()))
    assert formats == {torch.bfloat16, torch.float32}  # float32 are the timestep's features only
    formats.clear()
    denoiser.t_embedder.mlp[0].register_forward_pre_hook(lambda _, taken: (taken[0].bfloat16(),), prepend=True)
    with torch.autocast("cpu", torch.bfloat16):
        denoiser(*(each.bfloat16() if each.is_floating_point() else each for each in inputs()))
    assert formats == {torch.bfloat16}


@pytest.mark.parametrize("is_autocast", [False, True])
@torch.no_grad()
def test_timesteps_that_bfloat16_cannot_tell_apart_are_told_apart(is_autocast):
    denoiser = narrow().bfloat16()
    noisy, _, context, pooled = inputs(batch=1)
    timesteps = [torch.tensor([601]), torch.tensor([602])]
    assert timesteps[0].bfloat16() == timesteps[1].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        one, other = (denoiser(noisy, each, context, pooled) for each in timesteps)
    assert (one - other).abs().max() > 0.1


@torch.no_grad()
def test_positions_are_added_before_they_are_rounded():
    denoiser, seen = narrow().bfloat16(), []
    denoiser.positions.table.fill_(1.001)
    denoiser.x_embedder.proj.weight.zero_()
    denoiser.x_embedder.proj.bias.fill_(-1)
    denoiser.joint_blocks[0].register_forward_pre_hook(lambda _, taken: seen.append(taken[0]))
    with torch.autocast("cpu", torch.bfloat16):
        denoiser(*inputs())
    torch.testing.assert_close(seen[0].float(), torch.full_like(seen[0], 0.001, dtype=torch.float32), atol=0, rtol=0.01)


@pytest.mark.parametrize("is_autocast", [False, True])
@torch.no_grad()
def test_weights_stored_in_float8_give_what_their_rounded_values_give(is_autocast):
    denoiser, plain = narrow().bfloat16(), narrow().bfloat16()
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.weight.data = float8.rounded(module.weight.data).bfloat16()
    float8.store(denoiser)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        torch.testing.assert_close(denoiser(*inputs()), plain(*inputs()))


# ---- on a GPU -----------------------------------------------------------------------------------------------------
def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@on_gpu
@pytest.mark.parametrize("how", [{}, {"crop_offset": (0.1, 0.9)}, {"kept_tokens": KEPT}], ids=["all", "window", "some"])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_a_gpu_computes_the_same(name, how):
    wanted = rounded(narrow(name))(*inputs(), **how)
    denoiser = narrow(name).bfloat16().cuda()
    there = {each: value.cuda() if isinstance(value, torch.Tensor) else value for each, value in how.items()}
    with torch.autocast("cuda", torch.bfloat16):
        output = denoiser(*(each.cuda() for each in inputs()), **there)
    assert denoiser.positions.table.device.type == "cpu"
    assert (output.cpu() - wanted).square().mean().sqrt() < 0.03 * wanted.std()


@on_gpu
@pytest.mark.parametrize("is_scaled", [False, True])
@torch.no_grad()
def test_a_step_on_a_gpu_waits_for_nothing(is_scaled):
    denoiser, taken, kept = narrow().bfloat16().cuda(), [each.cuda() for each in inputs()], KEPT.cuda()
    if is_scaled:
        denoiser.scale_positions([(128, 128)])
    denoiser(*taken, crop_offset=(0.5, 0.5))
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoiser(*taken, crop_offset=(0.1, 0.9), kept_tokens=kept)
    finally:
        torch.cuda.set_sync_debug_mode("default")
