import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import CheckpointError, OptionError
from library.models import checkpointing, float8, t5
from library.models.checkpoint import open_tensors
from tests.models.reference import Shapes, read
from tests.models.sd3_text_encoders import t5_encoder, tiny_denoiser, write_encoder

TOKENS = torch.tensor([[3, 9, 1202, 13, 3, 9, 1712, 1, 0, 0, 0, 0], [8, 1712, 6, 30, 8, 5956, 1, 0, 0, 0, 0, 0]])
MASK = TOKENS != 0
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


@pytest.fixture(scope="module")
def reference():
    return t5_encoder()


@pytest.fixture(scope="module")
def path(reference, tmp_path_factory):
    return write_encoder(reference, tmp_path_factory.mktemp("t5") / "t5xxl.safetensors")


@pytest.fixture
def build(path):
    return lambda dtype=torch.float32: t5.build(open_tensors(path), dtype)


def states_of(model, mask=None):
    return model(input_ids=TOKENS, attention_mask=mask).last_hidden_state


# ---- what it computes ---------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_the_states_are_those_of_transformers(mask, reference, build):
    torch.testing.assert_close(t5.encode(build(), TOKENS, mask), states_of(reference, mask), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_bfloat16_the_states_are_those_of_transformers_in_bfloat16(reference, build):
    ours = t5.encode(build(torch.bfloat16), TOKENS)
    theirs = states_of(copy.deepcopy(reference).to(torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)


@torch.no_grad()
def test_masks_keep_what_is_padding_from_the_text(build):
    model = build()
    changed = TOKENS.masked_fill(~MASK, 99)
    with_mask = [t5.encode(model, tokens, MASK)[MASK] for tokens in (TOKENS, changed)]
    without = [t5.encode(model, tokens)[MASK] for tokens in (TOKENS, changed)]
    assert torch.equal(*with_mask)
    assert (without[0] - without[1]).abs().max() > 0.01


@torch.no_grad()
def test_nothing_is_dropped_at_random_in_train_mode(build):
    """The configurations of T5 files say 10 %, and checkpointed models are in train mode."""
    model = build()
    at_rest = t5.encode(model, TOKENS)
    assert torch.equal(t5.encode(model.train(), TOKENS), at_rest)


def large(reference):
    """Return a T5 whose feed-forward layers add up to more than float16 holds, as T5-XXL's do."""
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[-1].DenseReluDense.wi_0.weight.mul_(20)
            block.layer[-1].DenseReluDense.wi_1.weight.mul_(20)
            block.layer[-1].DenseReluDense.wo.weight.mul_(200)
    return model


@torch.no_grad()
def test_sums_beyond_float16_are_right_in_float16(reference, tmp_path):
    wide = large(reference)
    model = t5.build(open_tensors(write_encoder(wide, tmp_path / "t5.safetensors")), torch.float16)
    seen = []
    model.encoder.block[0].layer[-1].DenseReluDense.register_forward_hook(lambda _, __, out: seen.append(out))
    ours = t5.encode(model, TOKENS)
    assert seen[0].abs().max() > torch.finfo(torch.float16).max
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.float(), states_of(wide), atol=0.05, rtol=0.02)


def test_in_float16_the_last_feed_forward_weights_alone_are_float32(build, path):
    model = build(torch.float16)
    stored = load_file(path)
    for name, parameter in model.named_parameters():
        if name.endswith(".wo.weight"):
            assert torch.equal(parameter, stored[name])  # in float32, not by way of float16
        else:
            assert parameter.dtype == torch.float16, name
    assert {parameter.dtype for parameter in build(torch.bfloat16).parameters()} == {torch.bfloat16}


# ---- autocast -----------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize(
    ("own", "autocast"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float16)],
)
def test_autocast_does_not_reach_an_encoder_with_a_format_of_its_own(own, autocast, build):
    model = build(own)
    alone = t5.encode(model, TOKENS)
    with torch.autocast("cpu", autocast):
        within = t5.encode(model, TOKENS)
    assert within.dtype == own
    assert torch.equal(within, alone)


def test_autocast_reaches_an_encoder_in_the_format_of_all(build):
    """What is attached to it may be in float32, and counts on autocast."""
    model = build(torch.bfloat16)
    seen = []
    model.encoder.final_layer_norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        t5.encode(model, TOKENS)
    assert seen == [True]


# ---- float8 -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def float8_path(reference, tmp_path_factory):
    """Return a file as t5xxl_fp8_e4m3fn.safetensors: float8 throughout, without scales."""
    return write_encoder(reference, tmp_path_factory.mktemp("float8") / "t5.safetensors", torch.float8_e4m3fn)


@torch.no_grad()
def test_a_float8_file_gives_the_states_of_its_numbers(reference, float8_path):
    model = t5.build(open_tensors(float8_path), torch.float32)
    rounded = copy.deepcopy(reference)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    torch.testing.assert_close(t5.encode(model, TOKENS), states_of(rounded), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_kept_in_float8_compute_in_the_format_of_the_encoder(dtype, float8_path):
    model = t5.build(open_tensors(float8_path), dtype)
    before = t5.encode(model, TOKENS)
    float8.store(model)
    assert all(each.weight.dtype == torch.float8_e4m3fn for each in model.modules() if isinstance(each, nn.Linear))
    assert torch.equal(t5.encode(model, TOKENS), before)


# ---- files --------------------------------------------------------------------------------------------------------
def test_the_size_is_that_of_the_file(tmp_path):
    other = t5_encoder(d_model=32, d_kv=8, d_ff=80, num_layers=1, num_heads=6, relative_attention_num_buckets=16)
    model = t5.build(open_tensors(write_encoder(other, tmp_path / "t5.safetensors")), torch.float32)
    assert model.state_dict().keys() == other.state_dict().keys()
    torch.testing.assert_close(t5.encode(model, TOKENS), states_of(other), atol=1e-5, rtol=1e-5)


def test_the_names_and_shapes_are_those_of_t5_xxl():
    shapes = read("models/base_keys_sd3m.json.gz")["text_encoder_files"]["t5xxl"]
    model = t5.build(Shapes(shapes, ""), torch.bfloat16)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_762_310_656  # the embedding counts once
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("absent", EMBEDDINGS)
def test_either_name_of_the_embedding_is_enough(absent, build, path, tmp_path):
    tensors = load_file(path)
    del tensors[absent]
    save_file(tensors, tmp_path / "t5.safetensors")
    file = open_tensors(tmp_path / "t5.safetensors")
    assert torch.equal(t5.encode(t5.build(file, torch.float32), TOKENS), t5.encode(build(), TOKENS))
    assert t5.fingerprint(file) == t5.fingerprint(open_tensors(path))


@pytest.mark.parametrize(
    "absent",
    [
        "encoder.block.1.layer.0.SelfAttention.q.weight",
        "encoder.block.1.layer.1.DenseReluDense.wo.weight",
        "encoder.final_layer_norm.weight",
        t5.BIAS,
    ],
)
def test_a_missing_tensor_is_named(absent, path, tmp_path):
    tensors = load_file(path)
    del tensors[absent]
    save_file(tensors, tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match=f"1 of .* T5 text encoder tensors are missing .first: {absent}"):
        t5.build(open_tensors(tmp_path / "t5.safetensors"), torch.float32)


def test_a_file_without_a_t5_is_refused(tmp_path):
    save_file({"text_model.embeddings.token_embedding.weight": torch.zeros(2, 2)}, tmp_path / "clip.safetensors")
    file = open_tensors(tmp_path / "clip.safetensors")
    for read_it in (lambda: t5.build(file, torch.float32), lambda: t5.fingerprint(file)):
        with pytest.raises(CheckpointError, match="T5 text encoder tensors are missing"):
            read_it()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_the_fingerprint_tells_weights_apart_and_not_files(dtype, reference, tmp_path):
    first = write_encoder(reference, tmp_path / "1.safetensors", dtype)
    again = write_encoder(reference, tmp_path / "2.safetensors", dtype)
    other = write_encoder(t5_encoder(seed=4), tmp_path / "3.safetensors", dtype)
    found = [t5.fingerprint(open_tensors(each)) for each in (first, again, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_written_is_what_was_read(dtype, reference, tmp_path):
    stored = load_file(write_encoder(reference, tmp_path / "t5.safetensors", dtype))
    model = t5.build(open_tensors(tmp_path / "t5.safetensors"), dtype)
    written = t5.original_tensors(model)
    assert written.keys() == stored.keys() - {"encoder.embed_tokens.weight"}
    for name, tensor in written.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, stored[name]), name


@torch.no_grad()
def test_transformers_reads_what_is_written(reference, build, tmp_path):
    from transformers import T5EncoderModel

    save_file(t5.original_tensors(build()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference.config.save_pretrained(tmp_path)
    theirs = T5EncoderModel.from_pretrained(tmp_path).eval()
    assert torch.equal(states_of(theirs), states_of(reference))


# ---- training -----------------------------------------------------------------------------------------------------
def gradients(model, **arguments):
    model.requires_grad_()
    t5.encode(model, TOKENS, **arguments).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_gradients_with_checkpoints_are_those_of_transformers(mask, reference, build):
    model = build()
    checkpointing.enable(tiny_denoiser(), (model,), is_offloaded=False)
    found = gradients(model, mask=mask)
    theirs = copy.deepcopy(reference)
    states_of(theirs, mask).square().mean().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_checkpoints_leave_less_for_the_backward_pass(build):
    def kept(is_checkpointed):
        model = build()
        model.encoder.block[0].layer[0].SelfAttention.q.weight.requires_grad_()
        if is_checkpointed:
            checkpointing.enable(tiny_denoiser(), (model,), is_offloaded=False)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: sizes.append(each.numel()) or each, lambda each: each
        ):
            t5.encode(model, TOKENS)
        return sum(sizes)

    assert kept(True) < kept(False) / 4


# ---- --t5xxl_device and --t5xxl_dtype -------------------------------------------------------------------------------
def test_nothing_given_places_nothing():
    assert t5.placement(None, None) == (None, None)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("float16", torch.float16), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_formats_have_long_and_short_names(name, dtype):
    assert t5.placement("cpu", name) == (torch.device("cpu"), dtype)


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta", "cpuu", ""])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(OptionError, match=rf"--t5xxl_device {device}: no such device here\..*There are: cpu"):
        t5.placement(device, None)


def test_a_format_that_is_unknown_is_refused_and_the_nearest_named():
    with pytest.raises(OptionError, match=r"--t5xxl_dtype bfp16: no such format. Did you mean (bf16|fp16)\?"):
        t5.placement(None, "bfp16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_gpu_has_a_name():
    assert t5.placement("cuda", None) == (torch.device("cuda"), None)
    assert t5.placement("cuda:0", None) == (torch.device("cuda:0"), None)
