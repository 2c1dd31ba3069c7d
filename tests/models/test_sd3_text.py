from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.cache import text as text_cache
from library.errors import CheckpointError
from library.models import checkpointing, clip, sd3_text
from library.models.checkpoint import open_tensors
from library.models.family import Absent
from library.models.sd3_text import ENCODERS, Sd3Text, context_of, encode, outputs_of, text_of, tokenize
from tests.models.reference import Shapes, read
from tests.models.sd3_text_encoders import (
    G_WIDTH,
    L_WIDTH,
    T5_WIDTH,
    clip_encoder,
    make_encoders,
    pipeline_of,
    tiny_denoiser,
    write_encoder,
)

CAPTIONS = ["a photo of a cat", "a very big dog, on the grass " + "under the tree " * 40, ""]
LENGTH = 40
POOLED_WIDTH = L_WIDTH + G_WIDTH
NO_MASKS = {"masks_clip": False, "masks_t5": False}


@pytest.fixture(scope="module")
def reference():
    return make_encoders()


@pytest.fixture(scope="module")
def paths(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return [
        write_encoder(model, folder / f"{name}.safetensors") for name, model in zip(ENCODERS, reference, strict=True)
    ]


def build(paths, dtype=torch.float32):
    return tuple(sd3_text.build(open_tensors(path), slot, dtype) for slot, path in enumerate(paths))


@pytest.fixture(scope="module")
def encoders(paths):
    return build(paths)


@pytest.fixture(scope="module")
def tokens():
    return tokenize(CAPTIONS, LENGTH, None)


@pytest.fixture(scope="module")
@torch.no_grad()
def text(encoders, tokens):
    return encode(encoders, tokens, **NO_MASKS)


def context(text, dropped=None):
    return context_of(text, T5_WIDTH, POOLED_WIDTH, dropped)


def difference(one, other):
    return (one - other).abs().max().item()


# ---- beside diffusers ---------------------------------------------------------------------------------------------
@torch.no_grad()
def test_context_and_pooled_text_are_those_of_diffusers_pipeline(reference, text):
    pipeline = pipeline_of(reference)
    states, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=LENGTH
    )
    ours, ours_pooled = context(text)
    assert states.shape == ours.shape == (3, 77 + LENGTH, T5_WIDTH)
    torch.testing.assert_close(ours, states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours_pooled, pooled, atol=1e-5, rtol=1e-5)


# ---- tokens -------------------------------------------------------------------------------------------------------
def test_a_row_of_tokens_is_clip_ls_then_clip_gs_then_t5s(tokens):
    assert tokens.shape == (3, 1, 77 + 77 + LENGTH)
    assert tokens.dtype == torch.int64
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokens[0, 0, :77].tolist() == cat + [49407] * 70
    assert tokens[0, 0, 77:154].tolist() == cat + [0] * 70
    assert tokens[0, 0, 154:].tolist() == [3, 9, 1202, 13, 3, 9, 1712, 1] + [0] * 32


def test_long_captions_are_cut_to_one_window_and_to_t5s_length(tokens):
    long = tokens[1, 0]
    assert (long[76], long[153], long[-1]) == (49407, 49407, 1)
    assert 0 not in long[77:]


# ---- masks --------------------------------------------------------------------------------------------------------
def masked(rows):
    """Return where the tokens of CLIP-L, CLIP-G and T5 are text; the window is CLIP's, up to the first EOS."""
    clip_rows = [rows[:, 0, :77], rows[:, 0, 77:154]]
    starts = [(part == 49407).int().argmax(dim=1, keepdim=True) for part in clip_rows]
    return [*(torch.arange(77) <= start for start in starts), rows[:, 0, 154:] != 0]


@torch.no_grad()
def test_clips_masks_change_the_padding_and_no_text(encoders, tokens, text):
    found = encode(encoders, tokens, masks_clip=True, masks_t5=False)
    for name, is_text in zip(("clip_l", "clip_g"), masked(tokens), strict=False):
        plain, with_masks = getattr(text, name), getattr(found, name)
        assert difference(plain[is_text], with_masks[is_text]) < 1e-5
        assert difference(plain[~is_text], with_masks[~is_text]) > 1e-3
    assert difference(text.pooled_l, found.pooled_l) < 1e-5
    assert difference(text.pooled_g, found.pooled_g) < 1e-5
    assert torch.equal(text.t5, found.t5)


@torch.no_grad()
def test_t5s_mask_changes_the_text_and_nothing_of_clips(encoders, tokens, text):
    found = encode(encoders, tokens, masks_clip=False, masks_t5=True)
    is_text = masked(tokens)[2]
    assert difference(text.t5[0][is_text[0]], found.t5[0][is_text[0]]) > 1e-3
    assert difference(text.t5[1], found.t5[1]) < 1e-5  # it has no padding
    assert torch.equal(text.clip_l, found.clip_l)
    assert torch.equal(text.clip_g, found.clip_g)


@torch.no_grad()
def test_masks_are_those_that_transformers_is_given(reference, encoders, tokens):
    found = encode(encoders, tokens, masks_clip=True, masks_t5=True)
    rows, masks = tokens[:, 0].split([77, 77, LENGTH], dim=1), [each.long() for each in masked(tokens)]
    for index, name in enumerate(("clip_l", "clip_g")):
        theirs = reference[index](rows[index], attention_mask=masks[index], output_hidden_states=True)
        torch.testing.assert_close(getattr(found, name), theirs.hidden_states[-2], atol=1e-5, rtol=1e-5)
    theirs = reference[2](rows[2], attention_mask=masks[2]).last_hidden_state
    torch.testing.assert_close(found.t5, theirs, atol=1e-5, rtol=1e-5)


# ---- encoders that are missing, or not run ------------------------------------------------------------------------
def without(encoders, *missing):
    return tuple(Absent() if name in missing else each for name, each in zip(ENCODERS, encoders, strict=True))


@torch.no_grad()
def test_without_t5_77_rows_of_zeros_follow(encoders, tokens, text):
    found, pooled = context(encode(without(encoders, "t5xxl"), tokens, **NO_MASKS))
    whole, whole_pooled = context(text)
    assert found.shape == (3, 154, T5_WIDTH)
    assert torch.equal(found[:, :77], whole[:, :77])
    assert not found[:, 77:].any()
    assert torch.equal(pooled, whole_pooled)


@torch.no_grad()
@pytest.mark.parametrize(
    ("missing", "columns"), [("clip_l", slice(0, L_WIDTH)), ("clip_g", slice(L_WIDTH, POOLED_WIDTH))]
)
def test_without_one_clip_its_features_are_zeros_and_the_others_stay(missing, columns, encoders, tokens, text):
    found, pooled = context(encode(without(encoders, missing), tokens, **NO_MASKS))
    expected, expected_pooled = (tensor.clone() for tensor in context(text))
    expected[:, :77, columns] = 0.0
    expected_pooled[:, columns] = 0.0
    assert torch.equal(found, expected)
    assert torch.equal(pooled, expected_pooled)


@torch.no_grad()
def test_t5_alone_is_enough(encoders, tokens, text):
    found, pooled = context(encode(without(encoders, "clip_l", "clip_g"), tokens, **NO_MASKS))
    assert pooled.shape == (3, POOLED_WIDTH)
    assert not pooled.any()
    assert not found[:, :77].any()
    assert torch.equal(found[:, 77:], text.t5)


@torch.no_grad()
def test_a_part_of_the_encoders_can_be_run_and_joined_with_the_rest(encoders, tokens, text):
    clips = encode(encoders, tokens, **NO_MASKS, which=("clip_l", "clip_g"))
    t5_alone = encode(encoders, tokens, **NO_MASKS, which=("t5xxl",))
    assert clips.t5 is None
    assert outputs_of(t5_alone).keys() == {"t5"}
    for found, whole in zip(context(replace(clips, t5=t5_alone.t5)), context(text), strict=True):
        assert torch.equal(found, whole)


# ---- dropped texts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slot", range(3), ids=ENCODERS)
def test_a_dropped_texts_features_are_zeros_and_all_else_stays(slot, text):
    dropped = torch.zeros(3, 3, dtype=torch.bool)
    dropped[1, slot] = True
    expected, expected_pooled = (tensor.clone() for tensor in context(text))
    columns = (slice(0, L_WIDTH), slice(L_WIDTH, POOLED_WIDTH), slice(0, T5_WIDTH))[slot]
    expected[1, 77:] = 0.0 if slot == 2 else expected[1, 77:]
    if slot < 2:
        expected[1, :77, columns] = 0.0
        expected_pooled[1, columns] = 0.0
    found, pooled = context(text, dropped)
    assert torch.equal(found, expected)
    assert torch.equal(pooled, expected_pooled)


def test_nothing_dropped_changes_nothing(text):
    for found, expected in zip(context(text, torch.zeros(3, 3, dtype=torch.bool)), context(text), strict=True):
        assert torch.equal(found, expected)


def test_a_missing_encoders_text_can_be_dropped(text):
    dropped = torch.ones(3, 3, dtype=torch.bool)
    found, pooled = context(replace(text, clip_l=None, pooled_l=None, t5=None), dropped)
    assert not found.any()
    assert not pooled.any()


def test_what_is_dropped_gets_no_gradient(text):
    states = text.clip_g.clone().requires_grad_()
    dropped = torch.tensor([[False, True, False], [False, False, False], [True, False, True]])
    found, _ = context(replace(text, clip_g=states), dropped)
    found.sum().backward()
    assert states.grad.flatten(1).abs().amax(dim=1).tolist() == [0.0, 1.0, 1.0]


# ---- formats ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_t5_keeps_its_own_format_beside_the_others(paths, tokens, text):
    mixed = (*build(paths, torch.bfloat16)[:2], build(paths)[2])
    with torch.autocast("cpu", torch.bfloat16):
        found = encode(mixed, tokens, **NO_MASKS)
    assert (found.clip_l.dtype, found.clip_g.dtype, found.t5.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(found.t5, text.t5)
    assert context(found)[0].shape == (3, 77 + LENGTH, T5_WIDTH)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("t5_device", ["cpu", "cuda"])
def test_t5_can_be_on_a_device_of_its_own(t5_device, paths, tokens, text):
    models = build(paths)
    mixed = (models[0].cuda(), models[1].cuda(), models[2].to(t5_device))
    found = encode(mixed, tokens.cuda(), masks_clip=False, masks_t5=False)
    for name, tensor in outputs_of(found).items():
        assert tensor.is_cuda, name
        torch.testing.assert_close(tensor.cpu(), getattr(text, name), atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_masks_work_in_half_precision_with_and_without_autocast(is_autocast, dtype, paths, encoders, tokens):
    expected = outputs_of(encode(encoders, tokens, masks_clip=True, masks_t5=True))
    models = build(paths, dtype)
    with torch.autocast("cpu", dtype, enabled=is_autocast):
        found = outputs_of(encode(models, tokens, masks_clip=True, masks_t5=True))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], atol=0.1, rtol=0.05, msg=name)


@torch.no_grad()
def test_masks_reach_encoders_that_compute_in_autocasts_format(encoders, tokens):
    """Weights in float32 that learn, arithmetic in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        found = encode(encoders, tokens, masks_clip=True, masks_t5=True, which=("clip_l", "clip_g"))
    expected = encode(encoders, tokens, masks_clip=True, masks_t5=True, which=("clip_l", "clip_g"))
    torch.testing.assert_close(found.clip_g.float(), expected.clip_g, atol=0.1, rtol=0.05)


class Readings(TorchDispatchMode):
    """Counts what a GPU would be waited for: values that Python, or the size of a result, depends on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_value_is_read_back_from_the_device(encoders, tokens):
    dropped = torch.eye(3, dtype=torch.bool)
    with Readings() as readings:
        context(encode(encoders, tokens, masks_clip=True, masks_t5=True), dropped)
    assert readings.seen == []
    with readings:
        assert tokens.all().item() is False
    assert len(readings.seen) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_encoding_on_a_gpu_waits_for_nothing(paths, tokens):
    models, rows = [model.cuda() for model in build(paths, torch.bfloat16)], tokens.cuda()
    dropped = torch.eye(3, dtype=torch.bool, device="cuda")
    encode(models, rows, masks_clip=True, masks_t5=True)  # the first call picks kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, pooled = context(encode(models, rows, masks_clip=True, masks_t5=True), dropped)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()
    assert pooled.isfinite().all()


# ---- files --------------------------------------------------------------------------------------------------------
def test_every_encoder_is_built_from_true_names_and_shapes():
    files = read("models/base_keys_sd3m.json.gz")["text_encoder_files"]
    for slot, name in enumerate(ENCODERS):
        model = sd3_text.build(Shapes(files[name], ""), slot, torch.bfloat16)
        written = {key: list(tensor.shape) for key, tensor in sd3_text.original_tensors(model, slot).items()}
        assert written == {key: shape for key, shape in files[name].items() if key != "encoder.embed_tokens.weight"}


def test_clip_l_and_clip_g_are_told_apart_by_their_place(paths):
    for slot, activation in enumerate(("quick_gelu", "gelu")):
        for path in paths[:2]:
            assert sd3_text.build(open_tensors(path), slot, torch.float32).config.hidden_act == activation


def unprojected(path, folder):
    """Return a copy of a file that lacks the projection of the pooled text."""
    tensors = load_file(path)
    del tensors["text_projection.weight"]
    save_file(tensors, folder / "clip.safetensors")
    return open_tensors(folder / "clip.safetensors")


@torch.no_grad()
def test_a_clip_l_without_a_projection_pools_unprojected(paths, encoders, tokens, tmp_path):
    model = sd3_text.build(unprojected(paths[0], tmp_path), 0, torch.float32)
    own = tokens[:, 0, :77]
    _, last = clip.penultimate_states(encoders[0], own)
    expected = last[torch.arange(3), (own == 49407).int().argmax(dim=1)]
    torch.testing.assert_close(clip.pooled_text(model, last, own), expected)
    assert torch.equal(sd3_text.original_tensors(model, 0)["text_projection.weight"], torch.eye(L_WIDTH))


def test_a_clip_g_without_a_projection_is_refused(paths, tmp_path):
    with pytest.raises(CheckpointError, match=r"text_projection\.weight"):
        sd3_text.build(unprojected(paths[1], tmp_path), 1, torch.float32)


def test_a_projection_may_have_a_width_of_its_own(tmp_path):
    tensors = dict(clip_encoder(L_WIDTH, "quick_gelu", 1).state_dict())
    tensors["text_projection.weight"] = tensors["text_projection.weight"][:48].clone()
    save_file(tensors, tmp_path / "clip.safetensors")
    model = sd3_text.build(open_tensors(tmp_path / "clip.safetensors"), 0, torch.float32)
    assert model.text_projection.weight.shape == (48, L_WIDTH)


@pytest.mark.parametrize("slot", range(3), ids=ENCODERS)
def test_an_encoder_that_was_written_is_loaded_again_bit_by_bit(slot, paths, encoders, tmp_path):
    written = sd3_text.original_tensors(encoders[slot], slot)
    save_file(written, tmp_path / "written.safetensors")
    again = sd3_text.build(open_tensors(tmp_path / "written.safetensors"), slot, torch.float32)
    for name, tensor in encoders[slot].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    stored = load_file(paths[slot])
    assert written.keys() == stored.keys() - {"encoder.embed_tokens.weight"}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in written.items())


def test_each_encoder_has_a_fingerprint(paths):
    assert len({sd3_text.fingerprint(open_tensors(path), slot) for slot, path in enumerate(paths)}) == 3


# ---- the cache ----------------------------------------------------------------------------------------------------
def stored_sample(text, dtype, folder):
    """Return the first caption's outputs, and what the cache gives back of them, and its file."""
    path = folder / "entry.safetensors"
    outputs = {name: tensor[0].to(dtype) for name, tensor in outputs_of(text).items()}
    text_cache.write(path, outputs, text_cache.fingerprint_of(("a cat",), "encoders", dtype))
    return outputs, text_cache.read(path), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cache_gives_a_text_back_bit_by_bit(dtype, text, tmp_path):
    outputs, found, _ = stored_sample(text, dtype, tmp_path)
    again = text_of({name: tensor.unsqueeze(0) for name, tensor in found.items()})
    whole = text_of({name: tensor.unsqueeze(0) for name, tensor in outputs.items()})
    for one, other in zip(context(again), context(whole), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


def test_the_cache_keeps_nothing_of_encoders_that_are_missing(text, tmp_path):
    _, found, _ = stored_sample(replace(text, clip_g=None, pooled_g=None, t5=None), torch.float32, tmp_path)
    assert found.keys() == {"clip_l", "pooled_l"}
    assert text_of(found).t5 is None


def true_size(t5_length):
    shapes = {"clip_l": (1, 77, 768), "pooled_l": (1, 768), "clip_g": (1, 77, 1280), "pooled_g": (1, 1280)}
    shapes["t5"] = (1, t5_length, 4096)
    return Sd3Text(**{field.name: torch.ones(shapes[field.name]) for field in fields(Sd3Text)})


def test_a_caption_at_true_size_takes_two_and_a_half_megabytes(tmp_path):
    *_, path = stored_sample(true_size(256), torch.bfloat16, tmp_path)
    features = 2 * (77 * (768 + 1280) + 768 + 1280 + 256 * 4096)
    assert features == 2_416_640
    assert features < path.stat().st_size < features + 1000


# ---- training -----------------------------------------------------------------------------------------------------
def gradients(paths, tokens, *, is_checkpointed):
    models = build(paths)
    if is_checkpointed:
        checkpointing.enable(tiny_denoiser(), models, is_offloaded=False)
    for model in models:
        model.requires_grad_()
    found, pooled = context(encode(models, tokens, masks_clip=True, masks_t5=True))
    (found.square().mean() + pooled.square().mean()).backward()
    return [parameter.grad for model in models for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_of_all_encoders_with_checkpoints_are_those_without(paths, tokens):
    plain = gradients(paths, tokens, is_checkpointed=False)
    found = gradients(paths, tokens, is_checkpointed=True)
    assert len(found) == len(plain) > 100
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_frozen_encoders_leave_nothing_for_a_backward_pass(encoders, tokens):
    found = encode(encoders, tokens, **NO_MASKS)
    assert not any(tensor.requires_grad for tensor in outputs_of(found).values())
    assert all(isinstance(each, nn.Module) and not each.training for each in encoders)
