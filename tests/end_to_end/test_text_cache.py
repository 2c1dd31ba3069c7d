"""Runs whose captions are encoded before training: the same networks, and no text encoder where none is needed."""

import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from end_to_end.conftest import Train
from end_to_end.training_runs import (
    Family,
    Pictures,
    arguments,
    differing,
    draw_pictures,
    launch,
    picture,
    save,
    subset,
    tensors_of,
    write_toml,
)
from safetensors.torch import save_file
from torch import nn

UNET_ONLY = ("--network_train_unet_only", "--max_train_steps", 3)
IN_MEMORY = "--cache_text_encoder_outputs"
ON_DISK = "--cache_text_encoder_outputs_to_disk"

Encoded = Callable[..., int]


@pytest.fixture
def photos(tmp_path: Path) -> Pictures:
    """Two pictures of each kind, which the test may change."""
    return draw_pictures(tmp_path / "pictures")


@pytest.fixture
def config(tmp_path: Path, photos: Pictures) -> Path:
    return write_toml(tmp_path / "data.toml", subset(photos.photos, conditioning_data_dir=photos.photo_masks))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """One prompt with guidance and one without, one of them in two windows."""
    path = tmp_path / "prompts.txt"
    size = "--w 64 --h 64 --s 1 --d 1"
    path.write_text(f"a cat {'very ' * 90} big --n a (dog:1.4) {size}\na house --l 1 {size}\n", encoding="utf-8")
    return path


@pytest.fixture
def encoded(train: Train, config: Path, capfd: pytest.CaptureFixture[str]) -> Encoded:
    """Start a run with a cache on disk; return how many texts it encoded."""
    count = iter(range(100))

    def start(*more: object) -> int:
        capfd.readouterr()
        train(config, "--network_train_unet_only", "--max_train_steps", 1, ON_DISK, *more, name=f"start{next(count)}")
        (line,) = [line for line in capfd.readouterr().err.splitlines() if " text: " in line]
        return int(line.split(", ")[1].removesuffix(" encoded"))

    return start


@pytest.fixture
def loaded(family: Family, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which models the runs of the test load, in their order."""
    made, _ = family.load()
    seen: list[str] = []
    for name in ("load_denoiser", "load_text_encoders", "load_vae"):
        monkeypatch.setattr(type(made), name, noting(name.removeprefix("load_"), getattr(type(made), name), seen))
    return seen


def noting(name: str, load: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    """Return what loads in the same way and writes the name down."""

    def watched(*arguments: object) -> Any:
        seen.append(name)
        return load(*arguments)

    return watched


def pixels_of(folder: Path) -> list[str]:
    """Return what identifies the previews of a run, by the number of the prompt."""
    files = sorted((folder / "out" / "sample").glob("*.png"), key=lambda path: path.name.split("_")[2])
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


# ---- the same network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("--mixed_precision", "bf16"), marks=pytest.mark.slow),
        ("--caption_dropout_rate", 0.5, "--caption_prefix", "a photo of", "--weighted_captions"),
        ("--max_token_length", 150, "--clip_skip", 2, "--caption_dropout_every_n_epochs", 2),
    ],
    ids=["plain", "bf16", "dropout", "long"],
)
def test_captions_encoded_before_training_train_the_same_network(
    more, train: Train, config: Path, tmp_path: Path, family: Family
) -> None:
    family.skip_unless_taken(*more)
    plain = train(config, *UNET_ONLY, *more, name="plain")
    disk = (ON_DISK, "--cache_dir", tmp_path / "cache")
    for name, cache in {"memory": (IN_MEMORY,), "disk": disk, "again": disk}.items():
        cached = train(config, *UNET_ONLY, *more, *cache, name=name)
        assert cached.losses == plain.losses, name
        assert not differing(cached.tensors, plain.tensors), name


def test_wildcards_and_lines_are_all_encoded(train: Train, tmp_path: Path) -> None:
    images = tmp_path / "images"
    save(images, "a", picture(1), "a {red|green} {cat|dog}\na bird, {{sitting}}")
    save(images, "b", picture(2), "a house")
    config = write_toml(tmp_path / "d.toml", subset(images, enable_wildcard=True, num_repeats=4))
    plain = train(config, *UNET_ONLY, name="plain")
    cached = train(config, *UNET_ONLY, ON_DISK, name="cached")
    assert not differing(cached.tensors, plain.tensors)
    assert len(list(images.glob("text_*/*.safetensors"))) == 6


def test_previews_validation_and_preserved_pictures_are_as_without_the_cache(
    train: Train, photos: Pictures, prompts: Path, tmp_path: Path, family: Family
) -> None:
    if family.script == "sd3_train_network":
        pytest.skip("T5 rounds a caption otherwise beside another one; see test_sd3.py")
    config = write_toml(
        tmp_path / "d.toml",
        subset(photos.photos, validation_split=0.5, validation_seed=1),
        subset(photos.cutouts, alpha_mask=True, **{"custom_attributes.diff_output_preservation": True}),
    )
    more = ("--sample_prompts", prompts, "--sample_every_n_steps", 3, "--validate_every_n_steps", 2)
    tag = "loss/validation/step_average"
    plain = train(config, *UNET_ONLY, *more, name="plain")
    for name in ("first", "second"):
        cached = train(config, *UNET_ONLY, *more, ON_DISK, name=name)
        assert not differing(cached.tensors, plain.tensors)
        assert cached.curve(tag) == plain.curve(tag)
        assert pixels_of(cached.folder) == pixels_of(plain.folder)
    assert len(pixels_of(plain.folder)) == 2


def test_a_resumed_run_is_the_whole_run(train: Train, config: Path) -> None:
    options = (*UNET_ONLY[:1], "--max_train_steps", 4, ON_DISK)
    whole = train(config, *options, "--save_state", "--save_every_n_steps", 2, name="whole")
    state = whole.folder / "out" / "lora-step00000002-state"
    resumed = train(config, *options, "--resume", state, name="resumed")
    assert not differing(resumed.tensors, whole.tensors)


def test_what_is_merged_into_the_text_encoder_is_in_its_outputs(train: Train, config: Path) -> None:
    base = train(config, "--max_train_steps", 2, "--learning_rate", 0.1, name="base")
    assert any(name.startswith("lora_te") for name in base.tensors)
    merged = (*UNET_ONLY, "--base_weights", base.file)
    plain = train(config, *merged, name="plain")
    for name in ("first", "second"):
        assert not differing(train(config, *merged, ON_DISK, name=name).tensors, plain.tensors)
    assert differing(train(config, *UNET_ONLY, ON_DISK, name="without").tensors, plain.tensors)


@pytest.mark.slow
def test_processes_share_the_captions_and_train_as_one(family: Family, photos: Pictures, tmp_path: Path) -> None:
    """Five captions: one process encodes three of them, the other two; batches hold images of both."""
    for i in range(3):
        save(photos.photos, f"more{i}", picture(30 + i), f"more, {i}")
    cache = (*UNET_ONLY, ON_DISK, "--optimizer_type", "SGD", "--cache_dir")
    for name, batch_size in {"two": 2, "one": 4}.items():
        config = write_toml(tmp_path / f"{name}.toml", subset(photos.photos), batch_size=batch_size, resolution=128)
        argv = arguments(family, tmp_path / name, config, *cache, tmp_path / f"cache-{name}")
        if name == "one":
            assert family.run(*argv) == 0
            continue
        assert "text: 0 entries up to date, 5 encoded" in launch(family, 2, argv, tmp_path)
        assert "text: 5 entries up to date, 0 encoded" in launch(family, 2, argv, tmp_path)
    files = [{path.name for path in (tmp_path / f"cache-{name}").rglob("*.safetensors")} for name in ("two", "one")]
    assert files[0] == files[1]
    two, one = (tensors_of(tmp_path / name / "out" / "lora.safetensors") for name in ("two", "one"))
    largest = max(float((two[name].float() - one[name].float()).abs().max()) for name in one)
    moved = max(float(tensor.float().abs().max()) for name, tensor in one.items() if "lora_up" in name)
    assert largest < 1e-4 * moved


def test_a_model_of_a_folder_trains_the_same_network_however_much_of_it_is_loaded(
    train: Train, config: Path, family: Family
) -> None:
    options = (*UNET_ONLY, "--pretrained_model_name_or_path", family.folder())
    plain = train(config, *options, name="plain")
    for name in ("first", "second"):
        assert not differing(train(config, *options, ON_DISK, name=name).tensors, plain.tensors)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(("networks.dylora", "unit=2"), marks=pytest.mark.slow),
        ("networks.oft", ""),
        pytest.param(("lycoris.kohya", "algo=locon"), marks=pytest.mark.slow),
    ],
    ids=lambda m: m[0],
)
def test_other_networks_train_the_same_with_captions_encoded_before(
    module, train: Train, config: Path, family: Family
) -> None:
    family.skip_unless_taken(module[0])
    name, arguments = module
    pytest.importorskip(name.partition(".")[0])
    options = (*UNET_ONLY, "--network_module", name, "--network_dim", 4)
    options += ("--network_args", arguments) if arguments else ()
    plain = train(config, *options, name="plain")
    for run in ("first", "second"):
        assert not differing(train(config, *options, ON_DISK, name=run).tensors, plain.tensors)


def test_text_encoders_that_are_let_go_are_never_in_float8(train: Train, config: Path) -> None:
    half = (*UNET_ONLY, "--mixed_precision", "bf16")
    plain = train(config, *half, "--fp8_base_unet", name="plain")
    cached = train(config, *half, "--fp8_base", ON_DISK, name="cached")
    assert not differing(cached.tensors, plain.tensors)


# ---- what is loaded --------------------------------------------------------------------------------------------


def test_complete_caches_need_neither_text_encoders_nor_vae(
    train: Train, config: Path, loaded: list[str], prompts: Path
) -> None:
    caches = (*UNET_ONLY, ON_DISK, "--cache_latents_to_disk")
    first = train(config, *caches, name="first")
    assert loaded == ["text_encoders", "denoiser", "vae"]
    loaded.clear()
    second = train(config, *caches, name="second")
    assert loaded == ["denoiser"]
    assert not differing(first.tensors, second.tensors)
    previews = ("--sample_prompts", prompts, "--sample_every_n_steps", 3)
    for _ in range(2):
        loaded.clear()
        train(config, *caches, *previews, name=f"previews{len(list(config.parent.iterdir()))}")
    assert loaded == ["denoiser", "vae"]  # which draws the previews


def test_text_encoders_are_let_go_before_the_denoiser_is_loaded(
    train: Train, config: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = family.load()
    let_go: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []
    load_text_encoders, load_denoiser = type(made).load_text_encoders, type(made).load_denoiser

    def watched(self, *arguments):
        models = load_text_encoders(self, *arguments)
        let_go.extend(weakref.ref(module) for model in models for module in model.modules())
        return models

    def counting(self, *arguments):
        alive.append(sum(module() is not None for module in let_go))
        return load_denoiser(self, *arguments)

    monkeypatch.setattr(type(made), "load_text_encoders", watched)
    monkeypatch.setattr(type(made), "load_denoiser", counting)
    train(config, *UNET_ONLY, IN_MEMORY)
    assert let_go
    assert alive == [0]


def test_nobody_holds_the_text_encoders_and_the_vae_while_training(
    train: Train, config: Path, family: Family, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training import loop

    made, _ = family.load()
    let_go: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []
    load_text_encoders, load_vae, step = type(made).load_text_encoders, type(made).load_vae, loop.backward

    def watched(self, *arguments):
        models = load_text_encoders(self, *arguments)
        let_go.extend(weakref.ref(module) for model in models for module in model.modules())
        return models

    def watched_vae(self, *arguments):
        model = load_vae(self, *arguments)
        let_go.extend(weakref.ref(module) for module in model.modules())
        return model

    def counting(*arguments):
        alive.append(sum(module() is not None for module in let_go))
        return step(*arguments)

    monkeypatch.setattr(type(made), "load_text_encoders", watched)
    monkeypatch.setattr(type(made), "load_vae", watched_vae)
    monkeypatch.setattr(loop, "backward", counting)
    train(config, *UNET_ONLY, IN_MEMORY, "--cache_latents")
    assert let_go
    assert alive == [0, 0, 0]


@pytest.mark.parametrize(("size", "batches"), [((), [2, 2, 2]), (("--text_encoder_batch_size", 3), [3, 2])])
def test_the_text_encoders_take_as_many_captions_at_a_time_as_told(
    size, batches: list[int], train: Train, photos: Pictures, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        save(photos.photos, f"more{i}", picture(30 + i), f"more, {i}")
    made, _ = family.load()
    encode, seen = type(made).encode_text, []

    def counting(self, parts, tokens):
        seen.append(len(tokens))
        return encode(self, parts, tokens)

    monkeypatch.setattr(type(made), "encode_text", counting)  # of a single caption it is told twice
    config = write_toml(photos.photos / "d.toml", subset(photos.photos))
    train(config, *UNET_ONLY, IN_MEMORY, *size)
    assert seen == batches


# ---- what makes an entry stale ---------------------------------------------------------------------------------


def test_a_second_start_encodes_nothing_and_an_edited_caption_only_itself(
    encoded: Encoded, photos: Pictures, config: Path
) -> None:
    assert encoded() == 2
    assert encoded() == 0
    (photos.photos / "photo0.txt").write_text("another caption", encoding="utf-8")
    assert encoded() == 1
    (photos.photos / "photo0.txt").write_text("zundamon, photo 1, sitting", encoding="utf-8")
    assert encoded() == 0  # the caption of the other picture


@pytest.mark.parametrize(
    "more",
    [
        ("--max_token_length", 150),
        pytest.param(("--weighted_captions",), marks=pytest.mark.slow),
        pytest.param(("--mixed_precision", "bf16"), marks=pytest.mark.slow),
    ],
    ids=lambda more: more[0],
)
def test_what_decides_how_captions_are_encoded_makes_the_cache_stale(more, encoded: Encoded, family: Family) -> None:
    family.skip_unless_taken(*more, idle=True)
    assert encoded() == 2
    assert encoded(*more) == 2
    assert encoded(*more) == 0


def test_another_text_encoder_makes_the_cache_stale_and_another_unet_does_not(
    encoded: Encoded, family: Family, tmp_path: Path
) -> None:
    tensors = tensors_of(family.checkpoint())
    for parts, number in {
        ("cond_stage_model.", "conditioner.", "text_encoders."): 2,
        ("model.diffusion_model.",): 0,
    }.items():
        encoded()
        changed = {name: t * 1.01 if name.startswith(parts) and t.dim() > 1 else t for name, t in tensors.items()}
        other = tmp_path / f"{parts[0]}safetensors"
        save_file({name: t.contiguous() for name, t in changed.items()}, other)
        assert encoded("--pretrained_model_name_or_path", other) == number


def test_what_is_damaged_is_encoded_again_and_unchecked_entries_are_taken(
    encoded: Encoded, photos: Pictures, train: Train, config: Path
) -> None:
    plain = train(config, *UNET_ONLY, name="plain")
    encoded()
    first, _ = sorted(photos.photos.glob("text_*/*"))
    first.write_bytes(first.read_bytes()[:-100])
    assert encoded() == 1
    assert encoded("--skip_cache_check", "--max_token_length", 150) == 0
    assert not differing(train(config, *UNET_ONLY, ON_DISK, name="cached").tensors, plain.tensors)


def test_the_cache_lies_beside_the_images_or_in_cache_dir(encoded: Encoded, photos: Pictures, tmp_path: Path) -> None:
    encoded("--cache_dir", tmp_path / "cache")
    assert not list(photos.photos.glob("text_*"))
    assert len(list((tmp_path / "cache").glob("text_*/*.safetensors"))) == 2
    encoded()
    assert len(list(photos.photos.glob("text_*/*.safetensors"))) == 2


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--network_train_unet_only", "--shuffle_caption"], "shuffle_caption is on for"),
        (["--network_train_unet_only", "--token_warmup_step", 2], "token_warmup_step is on for"),
        (["--network_train_unet_only", "--caption_tag_dropout_rate", 0.5], "caption_tag_dropout_rate is on for"),
        (["--network_train_text_encoder_only"], "the text encoders cannot be trained"),
    ],
    ids=["shuffle", "warmup", "tags", "text encoder"],
)
def test_what_cannot_be_encoded_before_training_is_refused_before_a_model_is_loaded(
    more, words: str, family: Family, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if words == "the text encoders cannot be trained" and family.script == "sd3_train_network":
        pytest.skip("CLIP is trained beside what T5 makes of captions")
    assert family.run(*arguments(family, tmp_path, config, IN_MEMORY, *more)) == 2
    errors = capfd.readouterr().err
    assert words in errors
    assert "loaded" not in errors


def test_captions_without_end_are_refused_before_a_model_is_loaded(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "images", "many", picture(1), " ".join(["{a|b|c|d}"] * 6))
    config = write_toml(tmp_path / "d.toml", subset(tmp_path / "images", enable_wildcard=True))
    assert family.run(*arguments(family, tmp_path, config, IN_MEMORY, "--network_train_unet_only")) == 2
    errors = capfd.readouterr().err
    assert "many.png: the wildcards of its caption make more than 1000" in errors
    assert "loaded" not in errors
