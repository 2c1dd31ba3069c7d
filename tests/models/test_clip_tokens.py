import json

import pytest
import torch

from library.errors import CheckpointError
from library.models import clip
from library.models.clip_tokens import CONTENT, EOS, shipped_vocabulary, windows, write_vocabulary
from library.models.sd import Sd
from tests.models.reference import read

REFERENCE = read("models/tokens.json.gz")


def family(case, **changes):
    return Sd(v2=case["tokenizer"] == "v2", max_token_length=case["max_token_length"], **changes)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_captions_give_the_references_tokens(version):
    cases = [case for case in REFERENCE["tokenize"] if case["tokenizer"] == version]
    assert len(cases) > 20
    for case in cases:
        assert family(case).tokenize([case["text"]])[0].tolist() == case["ids"], case["text"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_weighted_captions_give_the_references_tokens_and_weights(version):
    for case in (case for case in REFERENCE["tokenize"] if case["tokenizer"] == version):
        tokens = family(case, weighted_captions=True).tokenize([case["text"]])[0]
        assert tokens[:, 0].long().tolist() == case["weighted_ids"], case["text"]
        torch.testing.assert_close(tokens[:, 1], torch.tensor(case["weights"]), atol=1e-5, rtol=0)


def test_long_captions_are_cut_into_the_references_windows():
    for case in REFERENCE["chunking"]:
        ids = [1000 + index for index in range(case["n_ids"])]
        assert windows(ids, case["max_token_length"] // CONTENT, case["pad"]) == case["out"], case["n_ids"]


def test_joined_windows_keep_the_references_positions():
    for case in REFERENCE["join_positions"]:
        number = case["max_token_length"] // CONTENT
        positions = torch.arange(number * 77).reshape(1, number, 77, 1)
        kept = [position % 20000 for position in case["kept"]]
        assert clip.join_windows(positions).flatten().tolist() == kept


def test_an_exclamation_mark_at_a_windows_start_stays_in_sd2():
    # the pad token of SD 2.x is "!" itself; a rule that looks at ids alone would take this window for an empty one
    family_of_two = Sd(v2=True, max_token_length=150)
    tokens = family_of_two.tokenize(["cat " * 75 + "! dog"])[0]
    assert tokens[1, :4].tolist() == [49406, 0, 1929, EOS]


def test_a_batch_has_one_row_a_caption_in_order():
    captions = ["a cat", "", "two dogs"]
    rows = [Sd().tokenize([caption])[0] for caption in captions]
    batch = Sd().tokenize(captions)
    assert batch.shape == (3, 1, 77)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, torch.stack(rows))


def test_the_vocabulary_has_49408_words_and_ends_with_the_marks():
    ids = shipped_vocabulary().ids
    assert len(ids) == 49408
    assert (ids["<|startoftext|>"], ids["<|endoftext|>"], ids["!"], ids["cat</w>"]) == (49406, 49407, 0, 2368)


def test_the_tokenizer_cache_dir_is_filled_and_then_read(tmp_path):
    folder = tmp_path / "openai_clip-vit-large-patch14"
    filled = Sd(tokenizer_cache_dir=str(tmp_path)).tokenize(["a cat"])
    assert torch.equal(filled, Sd().tokenize(["a cat"]))
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["cat</w>"] == 2368
    assert (folder / "merges.txt").is_file()


def test_a_tokenizer_folder_that_another_process_is_filling_is_not_read(tmp_path):
    """Every loader process asks for the tokenizer at once, when the folder is there and its files are not."""
    folder = tmp_path / "openai_clip-vit-large-patch14"
    folder.mkdir()
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    assert torch.equal(Sd(tokenizer_cache_dir=str(tmp_path)).tokenize(["a cat"]), Sd().tokenize(["a cat"]))


def test_a_tokenizer_cache_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"--tokenizer_cache_dir: .*cannot be written"):
        Sd(tokenizer_cache_dir=str(tmp_path / "file")).tokenize(["a cat"])


def test_a_vocabulary_found_in_the_tokenizer_cache_dir_is_used(tmp_path):
    folder = tmp_path / "openai_clip-vit-large-patch14"
    write_vocabulary(folder, shipped_vocabulary())
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    ids["cat</w>"], ids["dog</w>"] = ids["dog</w>"], ids["cat</w>"]
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    swapped = Sd(tokenizer_cache_dir=str(tmp_path)).tokenize(["a cat"])
    assert torch.equal(swapped, Sd().tokenize(["a dog"]))


def test_a_tokenizer_json_alone_will_do(tmp_path):
    vocabulary = shipped_vocabulary()
    folder = tmp_path / "stabilityai_stable-diffusion-2"
    folder.mkdir()
    model = {"vocab": dict(vocabulary.ids), "merges": [" ".join(pair) for pair in vocabulary.merges]}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    read_back = Sd(v2=True, tokenizer_cache_dir=str(tmp_path)).tokenize(["a photo of a cat"])
    assert torch.equal(read_back, Sd(v2=True).tokenize(["a photo of a cat"]))


def test_a_spoilt_tokenizer_folder_is_named(tmp_path):
    folder = tmp_path / "openai_clip-vit-large-patch14"
    folder.mkdir()
    (folder / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"openai_clip-vit-large-patch14.*Delete the folder"):
        Sd(tokenizer_cache_dir=str(tmp_path)).tokenize(["a"])
