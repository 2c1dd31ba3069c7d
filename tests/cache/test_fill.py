import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from library.cache.fill import Request, Source, ahead, fill, to_images
from library.cache.latents import Fingerprint, Stamp
from library.errors import DataError

MADE_OF = Fingerprint(Stamp("a", 0, 0, ""), "", "", "F32", "none", None)
BUCKETS = [(64, 128), (128, 64), (64, 64)]


def requests_of(count, *, needs_flipped=False):
    return [Request(i, f"{i}.png", BUCKETS[i % 3], needs_flipped) for i in range(count)]


def decode(request):
    width, height = request.bucket
    return Source(np.full((height, width, 3), request.key, dtype=np.uint8), None, MADE_OF, seed=2 * request.key)


def encode(images, seeds):
    return images[:, :1, ::8, ::8]


def run(requests, *, decode=decode, encode=encode, batch_size=4, dtype=torch.float32):
    kept = {}
    fill(
        requests,
        decode=decode,
        encode=encode,
        keep=lambda request, cached, made_of: kept.__setitem__(request.key, cached),
        batch_size=batch_size,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return kept


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_every_request_is_kept_with_its_own_latents(batch_size):
    requests = requests_of(20)
    kept = run(requests, batch_size=batch_size)
    assert sorted(kept) == list(range(20))
    for request in requests:
        width, height = request.bucket
        latents = kept[request.key].latents
        assert latents.shape == (1, height // 8, width // 8)
        torch.testing.assert_close(latents, torch.full_like(latents, request.key / 127.5 - 1))


def test_batches_are_of_one_bucket_and_as_large_as_asked():
    seen = []

    def watched(images, seeds):
        seen.append((tuple(images.shape[2:]), len(seeds)))
        return encode(images, seeds)

    run(requests_of(20), encode=watched, batch_size=4)
    assert sorted(size for _, size in seen) == [2, 3, 3, 4, 4, 4]
    assert len({shape for shape, _ in seen}) == 3


def test_images_reach_the_encoder_between_minus_one_and_one():
    pixels = np.array([[[0, 127, 255]]], dtype=np.uint8)
    images = to_images([pixels])
    assert images.shape == (1, 3, 1, 1)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.flatten(), torch.tensor([-1.0, -1 / 255, 1.0]))


def test_each_image_has_its_own_seed_and_its_mirror_another():
    seeds_seen = []

    def watched(images, seeds):
        seeds_seen.extend(seeds)
        return encode(images, seeds)

    run(requests_of(6, needs_flipped=True), encode=watched)
    assert sorted(seeds_seen) == list(range(12))  # decode gave the even ones


def test_mirrored_latents_are_of_the_mirrored_image():
    def ramp(request):
        row = np.arange(64, dtype=np.uint8)
        return Source(np.broadcast_to(row[None, :, None], (64, 64, 3)), None, MADE_OF, seed=0)

    def wide(images, seeds):
        return images[:, :1, ::8]

    kept = run([Request(0, "a", (64, 64), True), Request(1, "b", (64, 64), False)], decode=ramp, encode=wide)
    assert torch.equal(kept[0].flipped, kept[0].latents.flip(-1))
    assert kept[1].flipped is None


def test_latents_are_kept_in_the_dtype_asked_for_and_own_their_memory():
    kept = run(requests_of(9), dtype=torch.bfloat16)
    assert all(cached.latents.dtype == torch.bfloat16 for cached in kept.values())
    assert all(cached.latents.untyped_storage().nbytes() == cached.latents.nbytes for cached in kept.values())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_name_the_image_and_are_not_kept(wrong):
    kept = []

    def broken(images, seeds):
        latents = encode(images, seeds).clone()
        latents[[seed == 14 for seed in seeds], 0, 0, 0] = wrong
        return latents

    with pytest.raises(DataError, match=r"7\.png: the VAE makes NaN .* float16\. Use --no_half_vae\."):
        fill(
            requests_of(9),
            decode=decode,
            encode=broken,
            keep=lambda request, cached, made_of: kept.append(request.key),
            batch_size=1,
            dtype=torch.float16,
            device=torch.device("cpu"),
        )
    assert 7 not in kept


def test_an_overflow_in_half_precision_is_not_kept():
    with pytest.raises(DataError, match="--no_half_vae"):
        run(requests_of(3), encode=lambda images, seeds: encode(images, seeds) * 1e6, dtype=torch.float16)


def test_an_image_that_cannot_be_decoded_ends_the_pass():
    def broken(request):
        if request.key == 5:
            raise DataError("5.png: cannot be decoded")
        return decode(request)

    with pytest.raises(DataError, match=r"5\.png"):
        run(requests_of(50), decode=broken)


def test_an_entry_that_cannot_be_written_ends_the_pass():
    def full(request, cached, made_of):
        raise DataError("disk full")

    with pytest.raises(DataError, match="disk full"):
        fill(
            requests_of(50),
            decode=decode,
            encode=encode,
            keep=full,
            batch_size=2,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


def test_decoding_encoding_and_keeping_overlap():
    """The first encoding meets a later decoding, the second encoding the first keeping: neither goes on alone."""
    decoding, keeping = (threading.Barrier(2, timeout=20) for _ in range(2))
    num_decoded, num_encoded, num_kept = itertools.count(), itertools.count(), itertools.count()

    def meeting_decode(request):
        if next(num_decoded) == 1:
            decoding.wait()
        return decode(request)

    def meeting_encode(images, seeds):
        number = next(num_encoded)
        if number < 2:
            (decoding, keeping)[number].wait()
        return encode(images, seeds)

    def meeting_keep(*_):
        if next(num_kept) == 0:
            keeping.wait()

    fill(
        requests_of(12),
        decode=meeting_decode,
        encode=meeting_encode,
        keep=meeting_keep,
        batch_size=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert next(num_kept) == 12


def test_only_a_few_images_are_in_memory_at_a_time():
    lock, decoded, kept, most = threading.Lock(), 0, 0, 0

    def counted(request):
        nonlocal decoded, most
        with lock:
            decoded += 1
            most = max(most, decoded - kept)
        return decode(request)

    def keep(*_):
        nonlocal kept
        with lock:
            kept += 1

    fill(
        requests_of(200),
        decode=counted,
        encode=encode,
        keep=keep,
        batch_size=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert kept == 200
    assert most < 40


def test_work_ahead_keeps_the_order():
    with ThreadPoolExecutor(4) as pool:
        assert list(ahead(pool, lambda x: (time.sleep(0.001 * (x % 3)), x)[1], range(30), num_waiting=5)) == list(
            range(30)
        )
