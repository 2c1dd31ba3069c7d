"""What a dataset holds, in numbers: for the metadata of saved files, for messages, and for the eye."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from library.dataset import captions, mask_captions
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.geometry import Size
from library.dataset.plan import group_by_bucket
from library.dataset.scan import Sample
from library.metadata import MaskFacts

COLUMN = 12  # characters, of a bucket's size
OF_MASKS = ("alpha_mask", "conditioning_data_dir", "missing_mask", "unmasked_probability")
OF_MASKS_BEGIN = ("mask_", "random_placement", "placement_")  # the names of all other settings of masks


def describe(configs: Sequence[DatasetConfig], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return what a saved file says about each dataset (ss_datasets), as plain values that JSON can hold."""
    return [
        _describe_dataset(config, [sample for sample in samples if sample.dataset == number])
        for number, config in enumerate(configs)
    ]


def _describe_dataset(config: DatasetConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    is_bucketed = config.enable_bucket
    return {
        "is_dreambooth": any(subset.metadata_file is None for subset in config.subsets),
        "batch_size_per_device": config.batch_size,
        "num_train_images": sum(sample.num_repeats for sample in samples if not sample.is_reg),
        "num_reg_images": sum(sample.num_repeats for sample in samples if sample.is_reg),
        "resolution": list(config.resolution),
        "enable_bucket": is_bucketed,
        "min_bucket_reso": config.min_bucket_reso if is_bucketed else None,
        "max_bucket_reso": config.max_bucket_reso if is_bucketed else None,
        "tag_frequency": tag_frequency(samples),
        "bucket_info": bucket_info(samples) if is_bucketed else None,
        "resize_interpolation": config.resize_interpolation,
        "subsets": [
            _describe_subset(subset, sum(sample.subset.index == subset.index for sample in samples))
            for subset in config.subsets
        ],
    }


def _describe_subset(subset: SubsetConfig, num_images: int) -> dict[str, Any]:
    described = {
        "img_count": num_images,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        "image_dir": subset.image_dir.name,
        "class_tokens": subset.class_tokens,
        "is_reg": subset.is_reg,
    }
    described |= {"metadata_file": subset.metadata_file.name} if subset.metadata_file else {}
    return described | _mask_settings(subset)


def _mask_settings(subset: SubsetConfig) -> dict[str, Any]:
    """Return the settings of masks that are not at their defaults: others would be news to readers of plain files."""
    settings: dict[str, Any] = {}
    for each in fields(subset):
        value = getattr(subset, each.name)
        is_of_masks = each.name in OF_MASKS or each.name.startswith(OF_MASKS_BEGIN)
        if not is_of_masks or value == each.default:
            continue
        if isinstance(value, Path):
            value = value.name
        elif isinstance(value, tuple):
            pairs = [each for each in value if isinstance(each, tuple)]
            value = dict(pairs) if pairs else list(value)
        settings[each.name] = value
    return settings


def tag_frequency(samples: Iterable[Sample]) -> dict[str, dict[str, int]]:
    """Return how often each tag occurs, by the name of the folder or metadata file: each image counts once.

    Tags end at commas whatever the separator, and are in small letters, as in the metadata of sd-scripts. What is
    always left out of a caption does not count.
    """
    counts: dict[str, dict[str, int]] = {}
    for sample in samples:
        folder = counts.setdefault(sample.subset.source.name, {})
        never_shown = frozenset.intersection(*mask_captions.ways(sample))
        for line in sample.captions:
            shown = captions.without(line, sample.subset, never_shown) if never_shown else line
            for tag in (part.strip().lower() for part in shown.split(",")):
                if tag:
                    folder[tag] = folder.get(tag, 0) + 1
    return counts


def mask_facts(samples: Sequence[Sample]) -> MaskFacts:
    """Return how many of samples have masks, repeats counted; regularisation images do not count as images."""
    masked = [sample for sample in samples if sample.mask.is_given]
    return MaskFacts(
        is_masked=bool(masked),
        has_alpha=any(sample.mask.kind == "alpha" for sample in masked),
        num_images=sum(sample.num_repeats for sample in masked if not sample.is_reg),
    )


def bucket_info(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the buckets with their numbers of images, repeats counted, and the mean change of aspect by cutting."""
    counts = bucket_counts(samples)
    errors = [abs(_aspect(sample.transform.target) - _aspect(sample.transform.source)) for sample in samples]
    return {
        "buckets": {
            str(number): {"resolution": list(size), "count": count}
            for number, (size, count) in enumerate(counts.items())
        },
        "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0,
    }


def bucket_counts(samples: Iterable[Sample]) -> dict[Size, int]:
    """Return the number of images of each size, repeats counted, by width, then height."""
    counts: Counter[Size] = Counter()
    for sample in samples:
        counts[sample.transform.target] += sample.num_repeats
    return dict(sorted(counts.items()))


def _aspect(size: Size) -> float:
    return size[0] / size[1]


def mask_line(samples: Sequence[Sample], *, mean_weight: float | None = None) -> str:
    """Return one line that says how many masks of which source are in use, and which colour is learnt.

    Args:
        samples: all that is trained on.
        mean_weight: of the masked images, in [0, 1]; None where the masks have not been read.
    """
    kinds = Counter(sample.mask.kind for sample in samples)
    num_masked = kinds["file"] + kinds["alpha"] + kinds["own"]
    if not samples:
        return "masks: none, and no images"
    placed = (
        "; the canvas around placed images is not learnt" if any(s.subset.random_placement for s in samples) else ""
    )
    if not num_masked:
        return f"masks: none; all {len(samples)} images are learnt whole{placed}"
    sources = [f"{kinds['file']} file{'s' * (kinds['file'] != 1)}"] if kinds["file"] else []
    sources += [f"{kinds['alpha']} alpha"] if kinds["alpha"] else []
    sources += [f"{kinds['own']} of the class"] if kinds["own"] else []
    mean = f", mean weight {mean_weight:.2f}" if mean_weight is not None else ""
    num_unmasked = kinds["none"] + kinds["padding"]
    unmasked = f", {num_unmasked} unmasked" if num_unmasked else ""
    return (
        f"masks: {num_masked} of {len(samples)} images ({', '.join(sources)}){mean}{unmasked}; "
        f"white (255) is learnt, black (0) is not{placed}"
    )


def lines(configs: Sequence[DatasetConfig], samples: Sequence[Sample], validation: Sequence[Sample] = ()) -> list[str]:
    """Return what training would see, in words: datasets, subsets and buckets, a line each; and what is held back."""
    buckets = group_by_bucket(configs, samples)
    told = []
    for number, config in enumerate(configs):
        own = [sample for sample in samples if sample.dataset == number]
        told.append(
            f"dataset {number}: {_size(config.resolution)}, {_buckets_in_words(config)}, batch size {config.batch_size}"
        )
        told += [
            _subset_line(
                subset,
                [sample for sample in own if sample.subset.index == subset.index],
                [s for s in validation if (s.dataset, s.subset.index) == (number, subset.index)],
            )
            for subset in config.subsets
        ]
        for bucket in buckets:
            if bucket.dataset == number:
                told.append(
                    f"  bucket {_size(bucket.size):<{COLUMN}} {_number(len(bucket.samples), 'image')}, "
                    f"{bucket.num_draws} with repeats, {_number(bucket.num_batches, 'batch', 'batches')}"
                )
    num_draws = sum(bucket.num_draws for bucket in buckets)
    num_batches = sum(bucket.num_batches for bucket in buckets)
    told.append(
        f"an epoch: {_number(len(samples), 'image')}, {num_draws} with repeats, in "
        f"{_number(num_batches, 'batch', 'batches')}"
    )
    if validation:
        told.append(f"held back for validation: {_number(len(validation), 'image')}")
    turned = sum(sample.orientation != 1 for sample in samples)
    if turned:
        told.append(f"turned upright as their EXIF orientation says: {_number(turned, 'image')}")
    return told


def _buckets_in_words(config: DatasetConfig) -> str:
    if not config.enable_bucket:
        return "no buckets"
    limits = "nothing is enlarged"
    if not config.bucket_no_upscale:
        limits = f"sides from {config.min_bucket_reso} to {config.max_bucket_reso}"
    return f"buckets in steps of {config.bucket_reso_steps}, {limits}"


def _subset_line(subset: SubsetConfig, samples: Sequence[Sample], validation: Sequence[Sample]) -> str:
    kinds = Counter(sample.mask.kind for sample in (*samples, *validation))
    masks = [f"masks from {subset.conditioning_data_dir}: {kinds['file']}"] if subset.conditioning_data_dir else []
    masks += [f"alpha masks: {kinds['alpha']}"] if subset.alpha_mask else []
    masks += [f"masks of the class: {kinds['own']}"] if kinds["own"] else []
    kind = "regularisation, " if subset.is_reg else ""
    kind += "output preserved, " if subset.diff_output_preservation else ""
    held_back = f", {len(validation)} held back" if validation else ""
    return (
        f"  subset {subset.index}: {subset.source}: {kind}{_number(len(samples), 'image')} "
        f"with {_number(subset.num_repeats, 'repeat')}{held_back}, {'; '.join(masks) or 'no masks'}"
    )


def _number(count: int, one: str, several: str = "") -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
