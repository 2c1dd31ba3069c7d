import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.cache import text
from library.cache.store import TextStore
from library.cache.text_fill import TextSettings, fill, survey
from library.errors import DataError

SETTINGS = TextSettings(encoder="encoder", dtype=torch.float16, batch_size=2, to_disk=True)
KEYS = [("a cat",), ("a dog",), ("",), ("no", "a house"), ("a bird",)]


class Letters:
    """An encoder that counts letters, and its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, keys):
        self.calls.append(len(keys))
        return [
            {"hidden": torch.full((3, 2), float(len("".join(key)))), "pooled": torch.ones(2, requires_grad=True)}
            for key in keys
        ]


@pytest.fixture
def places(tmp_path):
    return {key: text.entry_path(tmp_path, key) for key in KEYS}


@pytest.mark.parametrize("to_disk", [True, False])
def test_every_text_is_encoded_once_in_batches(to_disk, places):
    encode = Letters()
    store = fill(survey(places, replace(SETTINGS, to_disk=to_disk)), encode)
    assert encode.calls == [2, 2, 2]  # the last goes twice: alone it would be rounded in another way
    assert len(store) == 5
    for key in KEYS:
        outputs = store.get(key)
        assert float(outputs["hidden"][2, 1]) == len("".join(key))
        assert {tensor.dtype for tensor in outputs.values()} == {torch.float16}
        assert not any(tensor.requires_grad for tensor in outputs.values())
    assert all(path.exists() == to_disk for path in places.values())


def test_texts_go_one_by_one_where_that_is_wanted(places):
    encode = Letters()
    fill(survey(places, replace(SETTINGS, batch_size=1)), encode)
    assert encode.calls == [1] * 5


def test_a_second_start_encodes_what_is_new(places):
    fill(survey(dict(list(places.items())[:3]), SETTINGS), Letters())
    found = survey(places, SETTINGS)
    assert (found.missing, found.num_fresh) == (tuple(KEYS[3:]), 3)
    encode = Letters()
    fill(found, encode)
    assert encode.calls == [2]
    assert survey(places, SETTINGS).missing == ()


def test_a_start_without_anything_new_reads_no_outputs(places, monkeypatch):
    fill(survey(places, SETTINGS), Letters())
    for path in places.values():
        with path.open("r+b") as file:  # the numbers are others, the length is the same
            file.seek(-4, os.SEEK_END)
            file.write(b"\xff\xff\xff\xff")
    assert survey(places, SETTINGS).missing == ()


@pytest.mark.parametrize("change", [{"encoder": "another"}, {"dtype": torch.float32}])
def test_another_encoder_or_format_makes_all_entries_anew(change, places):
    fill(survey(places, SETTINGS), Letters())
    other = replace(SETTINGS, **change)
    assert survey(places, other).missing == tuple(KEYS)
    fill(survey(places, other), Letters())
    assert survey(places, other).missing == ()


def test_an_unchecked_cache_is_not_opened(places):
    fill(survey(places, SETTINGS), Letters())
    places[KEYS[0]].write_bytes(b"damaged")
    unchecked = replace(SETTINGS, skip_check=True, encoder="another")
    assert survey(places, unchecked).missing == ()


def test_a_damaged_entry_is_named_and_made_again(places, caplog):
    fill(survey(places, SETTINGS), Letters())
    place = places[KEYS[1]]
    place.write_bytes(place.read_bytes()[:-1])
    found = survey(places, SETTINGS)
    assert found.missing == (KEYS[1],)
    assert str(place) in caplog.text
    assert float(fill(found, Letters()).get(KEYS[1])["hidden"][0, 0]) == 5


def test_processes_share_the_work_and_all_have_all(places):
    shares = [survey(places, replace(SETTINGS, process_index=i, num_processes=2)) for i in range(2)]
    assert [share.missing for share in shares] == [tuple(KEYS[::2]), tuple(KEYS[1::2])]
    stores = [fill(share, Letters()) for share in shares]
    for store in stores:
        assert [float(store.get(key)["hidden"][0, 0]) for key in KEYS] == [5, 5, 0, 9, 6]


def test_memory_has_all_texts_in_every_process(places):
    settings = replace(SETTINGS, to_disk=False, process_index=1, num_processes=2)
    assert survey(places, settings).missing == tuple(KEYS)


def test_a_run_that_is_killed_goes_on_where_it_was(places):
    class Killed(Letters):
        def __call__(self, keys):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(keys)

    with pytest.raises(KeyboardInterrupt):
        fill(survey(places, SETTINGS), Killed())
    assert survey(places, SETTINGS).missing == (KEYS[4],)


WRITER = """
import sys
from pathlib import Path
import torch
from library.cache import text
print("begun", flush=True)
outputs = {"hidden": torch.ones(1000, 1000)}
for number in range(10**6):
    key = (str(number % 5),)
    text.write(text.entry_path(Path(sys.argv[1]), key), outputs, text.fingerprint_of(key, "encoder", torch.float32))
"""


def test_a_process_that_is_killed_while_it_writes_leaves_whole_entries_or_none(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.2)
        writer.kill()
    keys = [(str(number),) for number in range(5)]
    states = [
        text.judge(text.entry_path(tmp_path, key), text.fingerprint_of(key, "encoder", torch.float32)) for key in keys
    ]
    assert text.State.FRESH in states
    assert set(states) <= {text.State.FRESH, text.State.MISSING}


@pytest.mark.parametrize(("dtype", "remedy"), [(torch.float16, "--mixed_precision bf16"), (torch.float32, "damaged")])
@pytest.mark.parametrize("to_disk", [True, False])
def test_outputs_that_are_no_numbers_are_an_error_that_names_the_caption(dtype, remedy, to_disk, places):
    def broken(keys):
        return [{"hidden": torch.tensor([[1.0, float("inf") if key == KEYS[1] else 2.0]])} for key in keys]

    with pytest.raises(DataError, match=rf'"a dog".*{remedy}'):
        fill(survey(places, replace(SETTINGS, dtype=dtype, to_disk=to_disk)), broken)
    assert not places[KEYS[1]].exists()


def test_what_the_format_cannot_hold_is_found_too(places):
    with pytest.raises(DataError, match="float16"):
        fill(survey(places, SETTINGS), lambda keys: [{"hidden": torch.full((1, 1), 1e6)} for _ in keys])


def test_a_long_caption_is_cut_in_the_message(places):
    long = ("word " * 100,)
    with pytest.raises(DataError) as raised:
        fill(survey({long: places[KEYS[0]]}, SETTINGS), lambda keys: [{"hidden": torch.full((1, 1), float("nan"))}])
    assert len(str(raised.value)) < 200


def test_nothing_to_encode_calls_no_encoder():
    def encode(keys):
        raise AssertionError

    assert len(fill(survey({}, SETTINGS), encode)) == 0


def test_a_batch_is_stacked_in_the_order_of_its_captions(places):
    store = fill(survey(places, SETTINGS), Letters())
    stacked = store.stacked(["a bird", "", "a bird", "a cat"])
    assert stacked["hidden"].shape == (4, 3, 2)
    assert stacked["hidden"][:, 0, 0].tolist() == [6, 0, 6, 5]


def test_outputs_in_memory_do_not_keep_the_batch_they_came_from():
    whole = torch.zeros(64, 3, 2)
    settings = replace(SETTINGS, dtype=torch.float32, to_disk=False, batch_size=64)
    store = fill(survey({KEYS[0]: None}, settings), lambda keys: [{"hidden": whole[0]}])
    assert store.get(KEYS[0])["hidden"].untyped_storage().nbytes() == 3 * 2 * 4


def test_an_entry_that_disappears_is_an_error_that_names_it(tmp_path):
    place = text.entry_path(tmp_path, KEYS[0])
    with pytest.raises(DataError, match=place.name):
        TextStore({KEYS[0]: place}).get(KEYS[0])
