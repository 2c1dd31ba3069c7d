import json

import pytest
import torch

from library.errors import CheckpointError
from library.models import t5_tokens
from library.models.t5_tokens import tokenize, vocabulary_name

CAPTIONS = ["a photo of a cat", "", "two dogs, on the grass"]


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("translate English to German: The house is wonderful.", [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]),
        ("a photo of a cat", [3, 9, 1202, 13, 3, 9, 1712, 1]),
        ("", [1]),
        ("naïve ﬁ ½ 東京", [3, 29, 9, 2, 162, 361, 209, 2, 357, 3, 2, 1]),
    ],
)
def test_captions_have_the_known_ids_then_eos_then_padding(caption, ids):
    assert tokenize([caption], 32, None)[0].tolist() == ids + [0] * (32 - len(ids))


def test_spaces_tabs_and_line_breaks_at_the_ends_and_in_a_row_count_as_in_t5():
    assert torch.equal(tokenize(["  a  photo\tof\na   cat \n"], 16, None), tokenize(["a photo of a cat"], 16, None))


def test_a_long_caption_is_cut_and_still_ends_with_eos():
    whole = tokenize(["cat " * 40], 64, None)[0]
    cut = tokenize(["cat " * 40], 16, None)[0]
    assert whole[40:42].tolist() == [1, 0]
    assert cut.tolist() == [*whole[:15].tolist(), 1]


def test_a_caption_that_just_fits_is_not_cut():
    assert tokenize(["a photo of a cat"], 8, None)[0].tolist() == [3, 9, 1202, 13, 3, 9, 1712, 1]


def test_a_batch_has_one_row_a_caption_in_order():
    batch = tokenize(CAPTIONS, 20, None)
    assert batch.shape == (3, 20)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, torch.cat([tokenize([caption], 20, None) for caption in CAPTIONS]))


def test_the_vocabulary_has_32100_pieces_and_the_known_marks():
    tokenizer = t5_tokens.tokenizer(None)
    assert tokenizer.get_vocab_size() == 32100
    assert [tokenizer.token_to_id(word) for word in ("<pad>", "</s>", "<unk>", "<extra_id_0>")] == [0, 1, 2, 32099]


def folder_of(cache_dir):
    return cache_dir / "google_t5-v1_1-xxl"


def test_the_tokenizer_cache_dir_is_filled_and_then_read(tmp_path):
    filled = tokenize(CAPTIONS, 20, str(tmp_path))
    assert torch.equal(filled, tokenize(CAPTIONS, 20, None))
    content = json.loads((folder_of(tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(content["model"]["vocab"]) == 32100
    assert [path.name for path in folder_of(tmp_path).iterdir()] == ["tokenizer.json"]


def write_other(cache_dir, **changes):
    """Put a tokenizer there whose first two ordinary pieces have changed places."""
    content = json.loads(t5_tokens.shipped_tokenizer())
    pieces = content["model"]["vocab"]
    pieces[3], pieces[9] = pieces[9], pieces[3]
    folder_of(cache_dir).mkdir()
    (folder_of(cache_dir) / "tokenizer.json").write_text(json.dumps(content | changes), encoding="utf-8")


def test_a_tokenizer_in_the_cache_dir_is_read_before_the_shipped_one(tmp_path):
    write_other(tmp_path)
    assert tokenize(["a photo of a cat"], 8, str(tmp_path))[0].tolist() == [9, 3, 1202, 13, 9, 3, 1712, 1]


def test_a_tokenizer_that_was_saved_while_it_cut_and_padded_does_neither(tmp_path):
    """transformers' tokenizers are saved with the setting of their last call."""
    padding = {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None}
    write_other(
        tmp_path,
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding=padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
    )
    assert tokenize(["a cat", "a photo of a cat"], 10, str(tmp_path)).tolist() == [
        [9, 3, 1712, 1, 0, 0, 0, 0, 0, 0],
        [9, 3, 1202, 13, 9, 3, 1712, 1, 0, 0],
    ]


def test_the_name_tells_another_tokenizer_from_the_shipped_one(tmp_path):
    (tmp_path / "same").mkdir()
    assert vocabulary_name(None) == vocabulary_name(str(tmp_path / "same")) == "shipped"
    write_other(tmp_path)
    assert len(vocabulary_name(str(tmp_path))) == 16


def test_a_damaged_tokenizer_says_what_to_do(tmp_path):
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match=r"google_t5-v1_1-xxl: not a T5 tokenizer.*Delete the folder"):
        tokenize(["a cat"], 8, str(tmp_path))


def test_a_folder_with_sentencepieces_file_alone_is_not_passed_over(tmp_path):
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / "spiece.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has a spiece.model but no tokenizer.json"):
        tokenize(["a cat"], 8, str(tmp_path))
    assert [path.name for path in folder_of(tmp_path).iterdir()] == ["spiece.model"]


def test_a_cache_dir_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"--tokenizer_cache_dir: .* cannot be written"):
        tokenize(["a cat"], 8, str(tmp_path / "file"))
