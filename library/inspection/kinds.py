"""The kinds of findings: what each code means, how bad it is, what to do; docs/check-dataset.md lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from library.dataset.problems import Joint, Problem, Severity


@dataclass(frozen=True)
class Kind:
    """What is the same of all findings with one code."""

    code: str  # stable: scripts may look for it
    severity: Severity  # as a rule; a finding may have another
    title: str  # of several
    remedy: str  # where a finding has none of its own


# fmt: off
GROUPS: Mapping[str, tuple[Kind, ...]] = MappingProxyType(
    {
        "Folders and files": (
            Kind("no-images", "error", "Folders without images",
                 "Check image_dir: relative names start at the folder the command runs in."),
            Kind("folder-level", "error", "Folders a level too high",
                 "Name the folder in which the images lie."),
            Kind("source-unreadable", "error", "Folders and metadata files that cannot be read",
                 "Check the name, and that the file can be opened."),
            Kind("folder-inner", "warning", "Folders within folders, whose images are not read",
                 "Name them in subsets of their own, or move the images up."),
            Kind("folder-repeats", "warning", "Folders named with repeats that do not count",
                 "Set num_repeats in the subset: only --train_data_dir reads it from names."),
            Kind("file-empty", "error", "Files without content",
                 "Copy it again, or take it away."),
            Kind("file-hidden", "note", "Hidden files and files of the system",
                 "Nothing has to be done: they are not read. Delete them if they get in the way."),
            Kind("file-format", "warning", "Pictures in formats that are not read",
                 "Save them as PNG, JPEG or WebP."),
            Kind("metadata-image", "error", "Listed images that are not there",
                 "Correct the name in the metadata file, or take the entry out."),
            Kind("metadata-size", "warning", "Listed sizes that are not the files' own",
                 "Nothing has to be done; make the metadata file again to be rid of it."),
            Kind("metadata-entries", "warning", "Entries of a metadata file that have no effect",
                 "Take out what is not used."),
        ),
        "Pictures": (
            Kind("image-unreadable", "error", "Pictures that cannot be read",
                 "Save it again, or take it away."),
            Kind("image-too-large", "error", "Pictures with too many pixels",
                 "Save it smaller."),
            Kind("image-animated", "warning", "Animated files, of which one picture is seen",
                 "Save the picture that you want as a file of its own."),
            Kind("image-16-bit", "note", "Pictures with 16 bits a channel, read as 8",
                 "Nothing has to be done; saved with 8 bits they load faster."),
            Kind("image-cmyk", "warning", "Pictures in the colours of print (CMYK)",
                 "Convert it to RGB with its colour profile: without, colours come out wrong."),
            Kind("image-palette", "note", "Palette pictures with transparency",
                 "Save it as RGBA, so that edges can be half transparent."),
            Kind("image-turned", "note", "Pictures turned by their EXIF mark",
                 "Nothing has to be done; a mask must be drawn for the picture as it is seen."),
            Kind("image-enlarged", "warning", "Small pictures that are enlarged a lot",
                 "Find a larger original, lower the resolution, or set bucket_no_upscale = true."),
            Kind("image-aspect", "warning", "Pictures of extreme proportions",
                 "Cut it to the part that matters."),
            Kind("image-cut", "warning", "Pictures of which most is cut away",
                 "Set enable_bucket = true, or cut it yourself."),
            Kind("image-same-stem", "warning", "Pictures that share a name, and so caption and mask",
                 "Rename one of them, with its caption and mask."),
            Kind("image-duplicate", "warning", "Pictures that are there twice",
                 "Take one away; num_repeats shows a picture more often."),
            Kind("image-similar", "note", "Pictures that are nearly the same",
                 "Keep the better one: what is there twice is learnt twice."),
            Kind("validation-leak", "warning", "Pictures held back that are trained on too",
                 "Take the copy out of training: the validation loss cannot tell otherwise."),
            Kind("reg-duplicate", "warning", "Regularisation images that are trained on too",
                 "Take it out of the regularisation images."),
            Kind("bucket-short", "warning", "Buckets with fewer pictures than a batch",
                 "Use larger bucket_reso_steps, a smaller batch, or more pictures of this shape."),
        ),
        "Transparency": (
            Kind("alpha-opaque", "warning", "Transparency that is opaque everywhere",
                 "Make transparent what must not be learnt, or leave alpha_mask out."),
            Kind("alpha-transparent", "warning", "Pictures that are transparent everywhere",
                 "Save it again with its transparency, or take it away."),
            Kind("alpha-unused", "warning", "Transparency that is not used as a mask",
                 "Set alpha_mask = true in the subset, or save the pictures without transparency."),
            Kind("alpha-hidden-picture", "note", "Pictures that go on under transparency",
                 'The model sees them there. mask_fill = "extend" hides them.'),
        ),
        "Masks: files": (
            Kind("mask-missing", "error", "Images without a mask",
                 'Draw one, or set missing_mask = "train_all" or "skip" in the subset.'),
            Kind("mask-surplus", "warning", "Masks without an image",
                 "Rename or delete it."),
            Kind("mask-near-miss", "error", "Masks that are nearly named like their image",
                 "Name it like its image, up to the extension."),
            Kind("mask-case", "error", "Masks whose names differ in capital letters",
                 "Give both the same letters: file systems differ in what they take for one name."),
            Kind("mask-same-stem", "warning", "Masks of one name",
                 "Delete the one that is not used."),
            Kind("mask-ambiguous", "error", "Masks that several images share by name",
                 "Put them into folders named like those of the images."),
            Kind("mask-folder-absent", "error", "Mask folders that are not there",
                 "Check conditioning_data_dir."),
            Kind("mask-folder-of-images", "warning", "Mask folders that are the images' own",
                 "Name the folder of the masks as conditioning_data_dir."),
            Kind("masks-unused", "warning", "Mask folders that nobody names",
                 "Set conditioning_data_dir in the subset, if these are its masks."),
            Kind("masked-loss-idle", "error", "--masked_loss without masks",
                 "Set conditioning_data_dir or alpha_mask in a subset, or leave --masked_loss out."),
            Kind("mask-shape", "error", "Masks of another shape than their image",
                 "Make both the same size."),
            Kind("mask-orientation", "error", "Masks for the picture before it is turned",
                 "Draw the mask for the picture as it is seen."),
            Kind("mask-unreadable", "error", "Masks that cannot be read",
                 "Save it again as an 8-bit greyscale PNG."),
            Kind("mask-animated", "warning", "Animated masks, of which one picture is seen",
                 "Save it as a PNG."),
            Kind("mask-16-bit", "note", "Masks with 16 bits, read as 8",
                 "Nothing has to be done: 65535 is white."),
            Kind("mask-jpeg", "warning", "Masks with the traces of JPEG",
                 "Save masks as PNG: around edges, black is not black and white not white."),
        ),
        "Masks: what they let through": (
            Kind("mask-empty", "warning", "Masks that are black everywhere",
                 "Paint white what is to be learnt, or take the image out."),
            Kind("mask-nearly-empty", "warning", "Masks that are nearly black",
                 "Check it; mask_area_norm = 1 lets small masks pull as hard as large ones."),
            Kind("mask-full", "warning", "Masks that are white everywhere",
                 "Paint black what must not be learnt, or delete the mask."),
            Kind("mask-inverted", "warning", "Masks that are probably inverted",
                 "White is learnt. Set mask_invert = true in the subset if black was meant."),
            Kind("mask-levels", "warning", "Masks that stop far below white",
                 "Save it with white as 255 (not 1), or set mask_labels if these are labels."),
            Kind("mask-in-alpha", "warning", "Masks drawn in transparency",
                 "Save it as greyscale: the transparency of a mask file is not looked at."),
            Kind("mask-coloured", "warning", "Coloured masks, of which red counts",
                 "Save it as greyscale, or set mask_labels if the colours are labels."),
            Kind("mask-is-picture", "warning", "Masks that are copies of their picture",
                 "Put the mask there."),
            Kind("mask-thin", "warning", "Strokes thinner than a latent cell",
                 "Set mask_dilate, so that they keep their weight."),
            Kind("mask-speckled", "warning", "Masks with many specks",
                 "Clean it: mask_erode and then mask_dilate, or a larger threshold where it was made."),
            Kind("mask-cut-away", "warning", "Masks whose white part is cut away",
                 "Set mask_aware_crop = true, or enable_bucket = true."),
            Kind("label-unlisted", "warning", "Labels that mask_labels does not list",
                 "List them, or add other = weight: they weigh 0."),
            Kind("label-unused", "note", "Labels that no mask has",
                 "Check the number or the colour."),
        ),
        "Captions": (
            Kind("caption-missing", "warning", "Images without a caption",
                 "Write captions, or set class_tokens."),
            Kind("caption-empty", "error", "Captions without text",
                 "Write a caption, or delete the file."),
            Kind("caption-unreadable", "error", "Captions that cannot be read",
                 "Check the file."),
            Kind("caption-encoding", "error", "Captions that are not UTF-8",
                 "Save the caption as UTF-8."),
            Kind("caption-garbled", "warning", "Captions with garbled letters",
                 "Write it again: it was saved in one encoding and read in another."),
            Kind("caption-extension", "warning", "Captions under another extension",
                 "Set caption_extension, or rename the files."),
            Kind("caption-names-masked", "warning", "Captions that name what is masked out",
                 "Set mask_drop_tags, or take the words out."),
            Kind("mask-caption-missing", "warning", "Captions beside masks that are not there",
                 "Write them, set caption_extension, or leave mask_captions out."),
            Kind("drop-tags-unused", "warning", "mask_drop_tags that no caption has",
                 "Check how the captions write it."),
            Kind("drop-tags-all", "warning", "Captions of which mask_drop_tags leaves nothing",
                 "Write more into the caption, or drop fewer tags."),
        ),
        "Settings": (
            Kind("only-regularisation", "error", "Data sets of regularisation images alone",
                 "Add a subset without is_reg."),
            Kind("validation-split", "warning", "Splits that hold back all or nothing",
                 "Change validation_split."),
            Kind("validation-shared", "warning", "Images held back in one subset and listed in another",
                 "Nothing has to be done: they are not trained on."),
            Kind("mask-settings-idle", "warning", "Mask settings without masks",
                 "Give the subset masks, or leave the settings out."),
            Kind("mask-settings-contradict", "warning", "Mask settings that work against each other",
                 "Change one of them."),
            Kind("placement-idle", "warning", "Settings of placement and crop that are switched off",
                 "Switch on what they belong to, or leave them out."),
        ),
        "Other": (Kind("other", "warning", "Other findings",
             "See the message."),),
    }
)
# fmt: on

KINDS: Mapping[str, Kind] = MappingProxyType({kind.code: kind for group in GROUPS.values() for kind in group})


def found(
    code: str,
    path: Path,
    reason: str,
    *,
    remedy: str = "",
    severity: Severity | None = None,
    files: tuple[Path, ...] = (),
    joint: str = "",
    name: str = "",
) -> Problem:
    """Return a finding.

    Args:
        code: of its kind.
        path: of the file that is wrong.
        reason: what is wrong with it, a sentence.
        remedy: what to do, if it is not what the kind says.
        severity: if it is not the kind's.
        files: others that it is about.
        joint: what several of it are, as in "3 masks are black"; empty where each is told by itself.
        name: among these, if it is not the file's.
    """
    kind = KINDS[code]
    remedy = remedy or kind.remedy
    together = Joint(joint, name or path.name, remedy) if joint else None
    return Problem(severity or kind.severity, path, f"{path}: {reason} {remedy}", together, code, remedy, files)


def reason_of(problem: Problem) -> str:
    """Return what is wrong: a problem's message without the path at its start and the remedy at its end."""
    return problem.message.removeprefix(f"{problem.path}: ").removesuffix(remedy_of(problem)).rstrip()


def remedy_of(problem: Problem) -> str:
    """Return what to do about a problem."""
    return problem.remedy or KINDS.get(problem.code, KINDS["other"]).remedy
