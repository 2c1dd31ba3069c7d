import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.dataset.config import DatasetConfig, SubsetConfig, load
from library.dataset.schema import DATASET_KEYS, SUBSET_KEYS, SUBSET_ONLY_KEYS
from library.errors import DataError, OptionError
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.masks import MaskOptions
from library.options.validation import ValidationOptions

DOCUMENTED = """
[[datasets.subsets]]
image_dir = "/path/to/a_zundamon"
caption_extension = ".txt"
conditioning_data_dir = "/path/to/a_zundamon_mask"
num_repeats = 8
"""


@pytest.fixture
def read(tmp_path):
    """Return a function from the text of a config, and options, to the datasets."""

    def read(text, *, name="dataset.toml", captions=None, masks=None, bucket_step_multiple=64, **dataset):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        options = DatasetOptions(dataset_config=path, **{"resolution": "512"} | dataset)
        groups = (options, captions or CaptionOptions(), masks or MaskOptions())
        return load(*groups, bucket_step_multiple=bucket_step_multiple)

    return read


def one_subset(lines="", *, dataset="", general="") -> str:
    return f"[general]\n{general}\n[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir='a'\n{lines}\n"


def subset_of(datasets) -> SubsetConfig:
    (config,) = datasets
    (subset,) = config.subsets
    return subset


def test_the_documented_config_for_mask_images_is_read_as_it_stands(read):
    expected = SubsetConfig(
        image_dir=Path("/path/to/a_zundamon"),
        caption_extension=".txt",
        conditioning_data_dir=Path("/path/to/a_zundamon_mask"),
        num_repeats=8,
    )
    assert read(DOCUMENTED) == (DatasetConfig((512, 512), (expected,)),)


def test_the_defaults_are_those_of_the_command_line(read):
    assert read(one_subset()) == (DatasetConfig((512, 512), (SubsetConfig(Path("a")),)),)


LEVELS = ["subset", "dataset", "general", "command line"]
VALUES = {
    "num_repeats": [2, 3, 4, 5],
    "shuffle_caption": [False, True, False, True],
    "keep_tokens": [0, 1, 2, 3],
    "caption_dropout_rate": [0, 0.25, 0.5, 0.75],
    "caption_prefix": ["s", "d", "g", "c"],
    "flip_aug": [False, True, False, True],
    "resize_interpolation": ["box", "area", "cubic", "lanczos"],
    "alpha_mask": [False, True, False, True],
    "conditioning_data_dir": ["s", "d", "g", "c"],
    "missing_mask": ["skip", "train_all", "error", "skip"],
    "face_crop_aug_range": [[1, 2], [1.5, 3], [2, 4], "3,5"],
    "token_warmup_step": [0, 10, 0.5, 100.0],
    "token_warmup_min": [1, 2, 3, 4],
    "caption_separator": [";", "|", "/", "+"],
    "caption_extension": [".s", ".d", ".g", ".c"],
    "keep_tokens_separator": ["", "d", "g", "c"],
    "secondary_separator": ["s", "d", "g", "c"],
    "caption_suffix": ["s", "d", "g", "c"],
    "enable_wildcard": [False, True, False, True],
    "caption_tag_dropout_rate": [0, 0.25, 0.5, 0.75],
    "caption_dropout_every_n_epochs": [0, 1, 2, 3],
    "color_aug": [False, True, False, True],
    "random_crop": [False, True, False, True],
    "cache_info": [False, True, False, True],
}
COMMAND_LINE = {"num_repeats": "dataset_repeats"}


@pytest.mark.parametrize("first", range(4), ids=LEVELS)
@pytest.mark.parametrize("key", VALUES)
def test_the_nearest_level_that_names_a_key_decides_even_with_false_or_0(read, key, first):
    def line(level):
        return f"{key} = {json.dumps(VALUES[key][level])}" if level >= first else ""

    name = COMMAND_LINE.get(key, key)
    groups = {group: {} for group in (DatasetOptions, CaptionOptions, MaskOptions)}
    owner = next(group for group in groups if name in {field.name for field in fields(group)})
    groups[owner][name] = VALUES[key][3]
    subset = subset_of(
        read(
            one_subset(line(0), dataset=line(1), general=line(2)),
            captions=CaptionOptions(**groups[CaptionOptions]),
            masks=MaskOptions(**groups[MaskOptions]),
            **groups[DatasetOptions],
        )
    )
    expected = VALUES[key][first]
    if key == "face_crop_aug_range":
        expected = tuple(expected) if first < 3 else (3.0, 5.0)
    if key == "conditioning_data_dir":
        expected = Path(expected)
    assert getattr(subset, key) == expected


DATASET_VALUES = {
    "batch_size": [2, 3, 4],
    "resolution": ["512", "576", "640"],
    "enable_bucket": [False, True, True],
    "min_bucket_reso": [256, 320, 384],
    "max_bucket_reso": [1024, 1088, 1152],
    "bucket_reso_steps": [64, 128, 192],
    "bucket_no_upscale": [False, True, True],
}


@pytest.mark.parametrize("first", range(3), ids=LEVELS[1:])
@pytest.mark.parametrize("key", DATASET_VALUES)
def test_the_nearest_level_decides_about_keys_of_a_dataset_too(read, key, first):
    def line(level):
        return f"{key} = {json.dumps(DATASET_VALUES[key][level])}" if level >= first else ""

    name = {"batch_size": "train_batch_size"}.get(key, key)
    others = "" if key == "enable_bucket" else "enable_bucket = true"  # without buckets their limits do not count
    given = {name: DATASET_VALUES[key][2]}
    text = one_subset(dataset=f"{line(0)}\n{others}", general=line(1))
    (config,) = read(text, **{"resolution": "768"} | given)
    expected = DATASET_VALUES[key][first]
    assert getattr(config, key) == ((int(expected),) * 2 if key == "resolution" else expected)


def test_an_empty_mask_folder_switches_an_inherited_one_off(read):
    assert subset_of(read(one_subset("conditioning_data_dir = ''", general="conditioning_data_dir = 'm'"))) == (
        SubsetConfig(Path("a"))
    )


@pytest.mark.parametrize("value", ["768", "[768, 768]", "'768'", "'768,768'", "[768]"])
def test_a_resolution_may_be_written_in_several_ways(read, value):
    assert read(one_subset(dataset=f"resolution = {value}"))[0].resolution == (768, 768)


def test_a_resolution_is_width_then_height(read):
    assert read(one_subset(dataset="resolution = '768,512'"))[0].resolution == (768, 512)


def test_an_extension_gets_its_dot(read):
    assert subset_of(read(one_subset("caption_extension = 'txt'"))).caption_extension == ".txt"


def test_json_is_read_like_toml(read):
    content = {"general": {"flip_aug": True}, "datasets": [{"subsets": [{"image_dir": "a", "keep_tokens": None}]}]}
    assert subset_of(read(json.dumps(content), name="dataset.JSON")) == SubsetConfig(Path("a"), flip_aug=True)


scalars = st.none() | st.booleans() | st.integers(-9, 10**12) | st.floats() | st.text(max_size=5) | st.just("512,768")
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2)
)
tables = st.dictionaries(st.sampled_from([*DATASET_KEYS, *SUBSET_KEYS, *SUBSET_ONLY_KEYS]), values, max_size=4)
subsets = st.lists(st.builds(lambda table: {"image_dir": "a"} | table, tables), max_size=2)
datasets = st.lists(st.builds(lambda table, own: table | {"subsets": own}, tables, subsets | values), max_size=2)
contents = st.fixed_dictionaries({}, optional={"general": tables | values, "datasets": datasets | values}) | values


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents)
def test_whatever_a_config_holds_it_is_read_or_refused_in_one_line(read, content):
    configs, message = (), ""
    try:
        configs = read(json.dumps(content), name="dataset.json")
    except OptionError as error:
        message = str(error)
    assert bool(configs) != bool(message)
    assert "\n" not in message
    assert all(config.subsets for config in configs)


def test_datasets_of_several_resolutions_may_share_a_folder(read):
    text = "".join(f"[[datasets]]\nresolution={r}\n[[datasets.subsets]]\nimage_dir='a'\n" for r in (512, 768))
    assert [config.resolution for config in read(text)] == [(512, 512), (768, 768)]


def test_masks_of_every_kind_may_stand_beside_regularisation_images(read):
    subsets = ["conditioning_data_dir='m'", "alpha_mask=true", "is_reg=true\nclass_tokens='cat'\nalpha_mask=true", ""]
    text = "[[datasets]]\n" + "".join(
        f"[[datasets.subsets]]\nimage_dir='{number}'\n{lines}\n" for number, lines in enumerate(subsets)
    )
    found = read(text)[0].subsets
    assert [(subset.conditioning_data_dir, subset.alpha_mask, subset.is_reg) for subset in found] == [
        (Path("m"), False, False),
        (None, True, False),
        (None, True, True),
        (None, False, False),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (one_subset("keep_token = 1"), r"datasets\[0\]\.subsets\[0\]\.keep_token .*Did you mean keep_tokens\?"),
        (one_subset("batch_size = 1"), r"subsets\[0\]\.batch_size cannot be set for a subset. Move it to"),
        (one_subset(dataset="image_dir = 'b'"), r"datasets\[0\]\.image_dir can only be set for a subset"),
        (one_subset(general="train_batch_size = 2"), r"general\.train_batch_size .*Did you mean batch_size\?"),
        (one_subset(general="dataset_repeats = 2"), r"Did you mean num_repeats\?"),
        (one_subset(general="prior_loss_weight = 1.0"), r"only be set on the command line, as --prior_loss_weight"),
        (one_subset("num_repeats = '3'"), r"subsets\[0\]\.num_repeats must be a whole number, got '3'"),
        (one_subset("num_repeats = 3.0"), r"num_repeats must be a whole number, got 3\.0"),
        (one_subset("flip_aug = 1"), r"flip_aug must be true or false, got 1"),
        (one_subset("caption_dropout_rate = 1.5"), r"caption_dropout_rate must be a number from 0 to 1, got 1\.5"),
        (one_subset("caption_separator = ''"), r"caption_separator must be a string of at least one character"),
        (one_subset("resize_interpolation = 'cubics'"), r"must be one of lanczos, .*got 'cubics'"),
        (one_subset("missing_mask = 'ignore'"), r"missing_mask must be one of error, train_all, skip"),
        (one_subset("face_crop_aug_range = [4, 2]"), r"face_crop_aug_range must be two numbers"),
        (one_subset(dataset="resolution = [1, 2, 3]"), r"datasets\[0\]\.resolution must be a size like 512"),
        (one_subset(dataset="resolution = '512x512'"), r"must be a size like 512"),
        (one_subset(dataset="resolution = true"), r"must be a size like 512"),
        (
            one_subset("custom_attributes = {diff_output_preservatoin = true}"),
            r"custom_attributes\.diff_output_preservatoin is not .*Did you mean diff_output_preservation\?",
        ),
        (one_subset("custom_attributes = {a = 1}"), r"custom_attributes\.a is not .*Known: diff_output_preservation\."),
        (
            one_subset(general="custom_attributes = {diff_output_preservation = 1}"),
            r"general\.custom_attributes\.diff_output_preservation must be true or false, got 1",
        ),
        (one_subset("metadata_file = 3"), r"subsets\[0\]\.metadata_file must be a path as a string, got 3"),
        (one_subset("mask_fill = ['keep', 'extnd']"), r"one or several of .*got .*'extnd'.*Did you mean extend\?"),
        (one_subset("missing_mask = 'trainall'"), r"missing_mask must be one of .*Did you mean train_all\?"),
        (one_subset("mask_prior_weight = inf"), r"mask_prior_weight must be a number of at least 0, got inf"),
        (
            one_subset("mask_prior_every = 2"),
            r"mask_prior_every can only be set on the command line, as --mask_prior_e",
        ),
        (one_subset("in_json = 'm.json'"), r"in_json is not a key of a dataset config\. Did you mean metadata_file"),
        (one_subset(dataset="validation_split = 'a'"), r"datasets\[0\]\.validation_split must be a number"),
        ("[[datasets]]\n[[datasets.subsets]]\nis_reg = true", r"subsets\[0\] has no image_dir"),
        ("[[datasets]]\nbatch_size = 1", r"datasets\[0\] has no \[\[datasets\.subsets\]\]"),
        ("[general]\nflip_aug = true", r"there is no \[\[datasets\]\]"),
        ("[[dataset]]", r"dataset cannot stand at the top.*Did you mean datasets\?"),
        ("general = 1", r"general must be a table, got 1"),
        (one_subset("num_repeats = 0"), r"datasets\[0\] has no subset with num_repeats of 1 or more"),
        ("datasets = [", r"dataset\.toml: is not valid TOML"),
        ("[[datasets]]\n[[datasets.subset]]\nimage_dir='a'", r"datasets\[0\]\.subset is not .*Did you mean subsets\?"),
        (r"""image_dir = "C:\users\me" """, r"Between double quotes \\ begins a special character"),
        (
            one_subset(r"""conditioning_data_dir = "C:\train\new" """),
            r"without special characters .*got 'C:\\train\\new'",
        ),
    ],
)
def test_a_config_that_cannot_be_used_says_where_and_why(read, text, message):
    with pytest.raises(OptionError, match=message) as error:
        read(text)
    assert "\n" not in str(error.value)
    assert "dataset.toml" in str(error.value)


def test_a_resolution_is_required(read):
    with pytest.raises(OptionError, match=r"datasets\[0\] has no resolution"):
        read(one_subset(), resolution=None)


def test_a_config_file_of_another_kind_is_refused(read):
    with pytest.raises(OptionError, match=r"must be a \.toml or \.json file"):
        read("", name="dataset.yaml")


def test_a_config_file_that_is_not_there_is_named(tmp_path):
    options = DatasetOptions(dataset_config=tmp_path / "absent.toml")
    with pytest.raises(OptionError, match=r"absent\.toml"):
        load(options, CaptionOptions(), MaskOptions())


def test_a_metadata_file_names_the_images_and_its_own_folder_is_where_they_start(read):
    (config,) = read("[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'a/m.json'\nnum_repeats = 3")
    assert config.subsets == (SubsetConfig(Path("a"), num_repeats=3, metadata_file=Path("a/m.json")),)


def test_a_metadata_file_goes_with_an_image_folder_and_masks(read):
    lines = "metadata_file = 'm.jsonl'\nconditioning_data_dir = 'masks'\nalpha_mask = true"
    assert subset_of(read(one_subset(lines))) == SubsetConfig(
        Path("a"), alpha_mask=True, conditioning_data_dir=Path("masks"), metadata_file=Path("m.jsonl")
    )


def test_two_metadata_files_of_one_image_folder_are_two_subsets(read):
    lines = "".join(f"[[datasets.subsets]]\nimage_dir='a'\nmetadata_file='{name}.json'\n" for name in "mnm")
    assert [subset.source.name for subset in read(f"[[datasets]]\n{lines}")[0].subsets] == ["m.json", "n.json"]


def test_keys_about_caption_files_are_warned_about_beside_a_metadata_file(read, caplog):
    read(one_subset("metadata_file = 'm.json'\ncaption_extension = '.txt'", general="cache_info = true"))
    assert "datasets[0].subsets[0].caption_extension has no effect with metadata_file" in caplog.text
    assert "cache_info" not in caplog.text


@pytest.mark.parametrize("general", ["mask_captions = true", ""])
def test_the_extension_of_captions_counts_beside_a_metadata_file_where_masks_have_captions(read, caplog, general):
    own = "" if general else "mask_captions = true"
    read(one_subset(f"metadata_file = 'm.json'\ncaption_extension = '.txt'\n{own}", general=general))
    assert "caption_extension" not in caplog.text


def test_in_json_makes_one_dataset_whose_names_start_at_train_data_dir():
    options = DatasetOptions(in_json="m.json", train_data_dir="photos", resolution="512", dataset_repeats=2)
    (config,) = load(options, CaptionOptions(shuffle_caption=True), MaskOptions(conditioning_data_dir="masks"))
    assert config == DatasetConfig(
        (512, 512),
        (
            SubsetConfig(
                Path("photos"),
                num_repeats=2,
                shuffle_caption=True,
                conditioning_data_dir=Path("masks"),
                metadata_file=Path("m.json"),
            ),
        ),
    )


def test_what_in_json_and_a_config_make_idle_is_warned_about(read, caplog):
    load(DatasetOptions(in_json="m.json", reg_data_dir="r", resolution="512"), CaptionOptions(), MaskOptions())
    assert "--reg_data_dir has no effect: --in_json names the images" in caplog.text
    read(one_subset(), in_json="m.json")
    assert "--in_json has no effect: --dataset_config names the images" in caplog.text


def test_the_same_folders_twice_in_one_dataset_count_once(read, caplog):
    text = "[[datasets]]\n" + "[[datasets.subsets]]\nimage_dir='a'\n" * 2
    assert len(read(text)[0].subsets) == 1
    assert "a is listed before" in caplog.text


def test_a_folder_may_be_used_again_with_other_masks(read):
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir='a'\nconditioning_data_dir='{m}'\n" for m in "mn")
    assert [subset.index for subset in read(f"[[datasets]]\n{subsets}")[0].subsets] == [0, 1]


@pytest.mark.parametrize("level", ["lines", "dataset", "general"])
def test_the_output_is_preserved_where_custom_attributes_ask_for_it(read, level):
    line = "custom_attributes = {diff_output_preservation = true}"
    text = one_subset(**{"lines": ""} | {level: line})
    assert subset_of(read(text)) == SubsetConfig(Path("a"), diff_output_preservation=True)


def test_an_empty_table_of_a_subset_beats_the_attributes_of_its_dataset(read):
    attributes = "custom_attributes = {diff_output_preservation = true}"
    assert not subset_of(read(one_subset("custom_attributes = {}", dataset=attributes))).diff_output_preservation


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("face_crop_aug_range = [2, 4]", "face_crop_aug_range has no effect with enable_bucket"),
    ],
)
def test_a_key_without_effect_is_warned_about(read, caplog, line, message):
    assert subset_of(read(one_subset(line), enable_bucket=True)) == SubsetConfig(Path("a"))
    assert message in caplog.text


def test_the_limits_of_buckets_become_multiples_of_the_step(read, caplog):
    config = read(one_subset(dataset="enable_bucket=true\nmin_bucket_reso=300\nmax_bucket_reso=1000"))[0]
    assert (config.min_bucket_reso, config.max_bucket_reso) == (256, 1024)
    assert "become 256 and 1024" in caplog.text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("min_bucket_reso = 600", "min_bucket_reso must be from 64 to the shorter side of the resolution 512x512"),
        ("min_bucket_reso = 63", "min_bucket_reso must be from 64"),
        ("resolution = 1024\nmax_bucket_reso = 900", "max_bucket_reso must be at least the longer side"),
        ("bucket_reso_steps = 32", "bucket_reso_steps must be a multiple of 64 for this model, got 32"),
        ("bucket_reso_steps = 96", "bucket_reso_steps must be a multiple of 64 for this model, got 96"),
    ],
)
def test_buckets_that_cannot_be_made_are_refused(read, lines, message):
    with pytest.raises(OptionError, match=message):
        read(one_subset(dataset=f"enable_bucket = true\n{lines}"))


def test_limits_and_steps_of_buckets_do_not_matter_without_buckets(read):
    assert read(one_subset(dataset="bucket_reso_steps = 32\nmin_bucket_reso = 4096"))


def test_limits_do_not_matter_where_nothing_is_enlarged(read):
    assert read(one_subset(dataset="enable_bucket = true\nbucket_no_upscale = true\nresolution = 2048"))


def test_another_model_may_allow_finer_steps(read):
    config = read(one_subset(dataset="enable_bucket = true\nbucket_reso_steps = 32"), bucket_step_multiple=32)[0]
    assert config.bucket_reso_steps == 32


def test_a_resolution_without_buckets_is_floored_to_whole_latent_cells(read, caplog):
    assert read(one_subset(), resolution="515,767")[0].resolution == (512, 760)
    assert "becomes 512x760" in caplog.text


def from_folders(**options) -> tuple[DatasetConfig, ...]:
    return load(DatasetOptions(**options), CaptionOptions(keep_tokens=1), MaskOptions(alpha_mask=True))


def test_the_folder_scheme_takes_repeats_and_class_words_from_names(tmp_path, caplog):
    for name in ("train/10_my_cat", "train/3", "train/notes", "train/0_none", "reg/1_cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train" / "1_file").touch()
    (config,) = from_folders(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution="512,768"
    )
    inherited = SubsetConfig(Path("x"), keep_tokens=1, alpha_mask=True)
    train, reg = tmp_path / "train", tmp_path / "reg"
    assert config.resolution == (512, 768)
    assert config.subsets == (
        replace(inherited, image_dir=train / "10_my_cat", num_repeats=10, class_tokens="my_cat", index=0),
        replace(inherited, image_dir=train / "3", num_repeats=3, class_tokens="", index=1),
        replace(inherited, image_dir=reg / "1_cat", num_repeats=1, class_tokens="cat", is_reg=True, index=2),
    )
    assert "notes is left out" in caplog.text


def test_a_training_folder_without_named_folders_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no sub-folder named"):
        from_folders(train_data_dir=str(tmp_path), resolution="512")


def test_a_training_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"--train_data_dir: there is no folder .*absent"):
        from_folders(train_data_dir=str(tmp_path / "absent"), resolution="512")


def test_no_dataset_at_all_says_how_to_give_one():
    with pytest.raises(OptionError, match="give --dataset_config=FILE or --train_data_dir=FOLDER"):
        from_folders(resolution="512")


def test_a_config_beats_the_folder_scheme_with_a_warning(read, caplog):
    assert subset_of(read(one_subset(), train_data_dir="elsewhere")) == SubsetConfig(Path("a"))
    assert "--train_data_dir has no effect" in caplog.text


def test_a_validation_split_may_stand_at_every_level_and_on_the_command_line(tmp_path):
    text = (
        "[[datasets]]\nvalidation_split=0.2\n[[datasets.subsets]]\nimage_dir='a'\nvalidation_split=0\n"
        "[[datasets.subsets]]\nimage_dir='b'\nvalidation_seed=3\n[[datasets.subsets]]\nimage_dir='r'\nis_reg=true\n"
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir='c'\n"
    )
    path = tmp_path / "d.toml"
    path.write_text(text, encoding="utf-8")
    groups = (DatasetOptions(dataset_config=str(path), resolution="512"), CaptionOptions(), MaskOptions())
    found = load(*groups, ValidationOptions(validation_split=0.5, validation_seed=9))
    splits = [(subset.validation_split, subset.validation_seed) for config in found for subset in config.subsets]
    assert splits == [(0, 9), (0.2, 3), (0, 9), (0.5, 9)]


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_validation_split_that_is_no_share_holds_nothing_back_and_is_said(read, caplog, share):
    assert subset_of(read(one_subset(dataset=f"validation_split = {share}"))).validation_split == 0
    assert f"validation_split {share} is not from 0 to 1: nothing is held back" in caplog.text
