"""Checks of masks: how their files are painted, and what they let through once they are shaped and cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from library.dataset import looks
from library.dataset.problems import Joint, Problem, listed
from library.dataset.scan import Sample
from library.inspection.facts import Coverage, Looked, MaskFacts
from library.inspection.kinds import KINDS, found
from library.inspection.scene import Scene
from library.inspection.shapes import ROOMIER, share_cut
from library.masks import CELL

NEARLY = 0.02  # a mean weight this near to 0 is suspicious
WHITE_FRAME, BLACK_CENTRE = 0.75, 0.25  # of an inverted mask
MOST_LOST = 0.3  # share of what is white that the cut may leave out
UNEVEN = 1.4  # times the share that the cut takes of the whole picture
DIM = 48  # brightest pixel of a mask that was saved as 0 and 1, or as labels
COLOURED = 0.01  # share of the pixels
RINGING = 0.004  # share of the pixels
LOSSY = ("JPEG", "MPO")
SPECKS = 40
THIN_SHARE, THIN_CELLS = 0.2, 12  # of strokes that matter: of all that is white, or in cells
LABEL_SHARE = 0.001  # of a map that matters
SHALLOW = 8  # bits
SAME_SHAPE_TURNS = (2, 3, 4)  # EXIF orientations that leave width and height as they are


def of_files(scene: Scene) -> Iterator[Problem]:
    """Yield what is wrong with mask files as they are painted, a file once."""
    for looked in scene.looked_once:
        if looked.mask is not None and looked.mask.file is not None:
            yield from _of_file(looked, looked.mask)


def _of_file(looked: Looked, mask: MaskFacts) -> Iterator[Problem]:
    path, image = _path(looked.sample), (looked.sample.path,)
    assert mask.file is not None
    if _is_copy(looked):
        if path.resolve() != looked.sample.path.resolve():  # of a folder that is its own mask folder the scan tells
            yield found("mask-is-picture", path, f"is the same file as {looked.sample.path}.", files=image)
        return
    if mask.file.num_frames > 1:
        reason = f"is animated: of its {mask.file.num_frames} pictures the first is seen."
        yield found("mask-animated", path, reason, files=image)
    if mask.file.bits > SHALLOW:
        reason = f"has {mask.file.bits} bits, of which 8 are read."
        yield found("mask-16-bit", path, reason, files=image, joint="masks have more than 8 bits")
    if mask.coloured > COLOURED and not looked.sample.mask.shape.labels:
        reason = f"has colours in {mask.coloured:.0%} of its pixels, and only red counts."
        yield found("mask-coloured", path, reason, files=image, joint="masks are coloured, and only red counts")
    if mask.file.format in LOSSY and mask.ringing > RINGING:
        reason = f"is a JPEG: {mask.ringing:.1%} of its pixels are nearly black or white, but not quite."
        yield found("mask-jpeg", path, reason, files=image, joint="masks are JPEGs, whose edges are blurred")
    turned = looked.sample.orientation
    is_square = looked.sample.transform.source[0] == looked.sample.transform.source[1]
    if mask.file.orientation != turned and (turned in SAME_SHAPE_TURNS or (turned != 1 and is_square)):
        reason = f"fits {image[0].name} as stored and as turned (EXIF orientation {turned}): see if it lies right."
        yield found("mask-orientation", path, reason, severity="warning", files=image)
    if mask.labels and not _tells_little(mask.labels):
        names = listed([f"{label} ({share:.1%})" for label, share in mask.labels if share > LABEL_SHARE])
        reason = f"has labels that mask_labels does not list: {names}. They weigh 0."
        joint = "label maps have labels that mask_labels does not list"
        yield found("label-unlisted", path, reason, files=image, joint=joint)


def _tells_little(labels: tuple[tuple[str, float], ...]) -> bool:
    return all(share <= LABEL_SHARE for _, share in labels)


def unused_labels(scene: Scene) -> Iterator[Problem]:
    """Yield labels of a table that no mask of its subset has."""
    for config in scene.configs:
        for subset in config.subsets:
            masks = [each.mask for each in scene.looked if each.sample.subset == subset and each.mask is not None]
            masks = [mask for mask in masks if mask.file is not None]
            if not subset.mask_labels or not masks:
                continue
            seen = frozenset[str]().union(*(mask.listed for mask in masks))
            unused = [label for label, _ in subset.mask_labels if label not in seen and label not in ("other", "0")]
            if unused:
                place = subset.conditioning_data_dir or subset.source
                yield found("label-unused", place, f"no mask has the labels {listed(unused)} of mask_labels.")


def as_used(scene: Scene) -> Iterator[Problem]:
    """Yield masks that let nothing, little, all, the wrong part or only remains of their image through."""
    in_own_folder = {problem.path for problem in scene.scan.problems if problem.code == "mask-folder-of-images"}
    cut_off = {problem.path for problem in scene.scan.problems if problem.code == "mask-cut-away"}
    for looked in scene.looked:
        sample = looked.sample
        if sample.path in cut_off or looked.coverage is None or looked.mask is None or _is_copy(looked):
            continue
        if sample.mask.path is not None and sample.mask.path.parent in in_own_folder:
            continue
        problem = _painted_wrong(looked, looked.mask) or _of_coverage(
            looked, looked.mask, looked.coverage, scene.configs[sample.dataset].enable_bucket
        )
        if problem is not None:
            yield problem


def _painted_wrong(looked: Looked, mask: MaskFacts) -> Problem | None:
    """Return what makes the weights of a mask another thing than was meant."""
    path, image = _path(looked.sample), (looked.sample.path,)
    if mask.file is None or looked.sample.mask.shape.labels:
        return None
    if mask.alpha is not None and mask.alpha[0] < mask.alpha[1] and mask.least == mask.most:
        colour = "white" if mask.most == 255 else "black" if mask.most == 0 else f"of one grey, {mask.most}"
        reason = f"has its shape in its transparency, and is {colour} everywhere underneath."
        return found("mask-in-alpha", path, reason, files=image, joint="masks have their shape in their transparency")
    if 0 < mask.most <= DIM:
        reason = f"is at most {mask.most} of 255 bright: was it saved with 1 as white, or with labels?"
        return found("mask-levels", path, reason, files=image, joint="masks stop far below white, 255")
    return None


def _of_coverage(looked: Looked, mask: MaskFacts, coverage: Coverage, is_bucketed: bool) -> Problem | None:
    sample = looked.sample
    code, text, joined = _doubt(sample, mask, coverage)
    is_small = code in ("mask-empty", "mask-nearly-empty", "")
    share = share_cut(sample)
    even = min(UNEVEN * share, (1 + share) / 2)  # less than all, however much is cut
    if is_small and coverage.lost > max(MOST_LOST, even):
        reason = f"{coverage.lost:.0%} of what it lets through lies outside of the {_kept(sample)}."
        joint = "masks lose what they let through to the cut"
        settings = {"mask_aware_crop": sample.subset.mask_aware_crop, "enable_bucket": is_bucketed}
        remedy = f"Set {' or '.join(f'{name} = true' for name, is_on in settings.items() if not is_on)}."
        remedy = ROOMIER if all(settings.values()) else remedy
        return found("mask-cut-away", _path(sample), reason, remedy=remedy, files=_about(sample), joint=joint)
    if code:
        kind = "mask" if sample.mask.kind == "file" else "alpha channel"
        path = _path(sample)
        together = Joint(joined, path.name, "Inverted? White is learnt." if code == "mask-inverted" else "")
        message = f"{path}: the {kind} {text}"
        return Problem("warning", path, message, together, code, KINDS[code].remedy, _about(sample))
    return _details(looked, mask, coverage)


def _doubt(sample: Sample, mask: MaskFacts, coverage: Coverage) -> tuple[str, str, str]:
    """Return code, message and joint of a mask that is empty, full, nearly empty or inverted; the code is else ''."""
    (width, height), resized, name = sample.transform.target, sample.transform.resized, sample.path.name
    everywhere = "everywhere"
    if resized != (width, height) and not looks.is_cut_anew(sample):  # what is cut off may be of another colour
        everywhere += f" in the {_kept(sample)}"
    is_alpha = sample.mask.kind == "alpha"
    if coverage.judged == 0:
        code = "alpha-transparent" if is_alpha and mask.most == 0 else "mask-empty"
        joint = "masks are black everywhere, so that nothing of their image is learnt"
        return code, f"is black {everywhere}: nothing of {name} is learnt.", joint
    if coverage.judged < NEARLY:
        joint = f"masks let less than {NEARLY:.0%} of their image through"
        return "mask-nearly-empty", f"lets only {coverage.judged:.1%} of {name} through.", joint
    if coverage.judged == 1:
        code = "alpha-opaque" if is_alpha and mask.least == 255 else "mask-full"
        joint = "masks are white everywhere, as if there were none"
        return code, f"is white {everywhere}: all of {name} is learnt, as without a mask.", joint
    if coverage.frame > WHITE_FRAME and coverage.centre < BLACK_CENTRE:
        text = "is white along the border and black in the middle: is it inverted? White is learnt."
        return "mask-inverted", text, "masks are white along the border and black in the middle"
    return "", "", ""


def _details(looked: Looked, mask: MaskFacts, coverage: Coverage) -> Problem | None:
    """Return what is wrong with a mask whose large parts are right."""
    sample, strokes = looked.sample, coverage.strokes
    if mask.specks >= SPECKS:
        reason = f"has {mask.specks} specks, islands of a few pixels."
        return found("mask-speckled", _path(sample), reason, files=_about(sample), joint="masks have many specks")
    if strokes and (strokes.share >= THIN_SHARE or strokes.num_cells >= THIN_CELLS):
        cell = CELL * sample.transform.source[0] / sample.transform.resized[0]
        reason = (
            f"has strokes about {strokes.width:.0f} pixels wide, {strokes.share:.0%} of its white, and a latent cell "
            f"stands for {cell:.0f}: most of their weight is lost."
        )
        remedy = f"Set mask_dilate = {strokes.dilate:.0f} in the subset, or paint them wider."
        return found(
            "mask-thin", _path(sample), reason, remedy=remedy, files=_about(sample), joint="masks have thin strokes"
        )
    return None


def _kept(sample: Sample) -> str:
    (width, height), resized = sample.transform.target, sample.transform.resized
    return f"{width}x{height} that are kept of {resized[0]}x{resized[1]}"


def _is_copy(looked: Looked) -> bool:
    """Return whether a mask is its own picture."""
    if looked.mask is None or looked.mask.file is None or looked.picture is None:
        return False
    return looked.mask.file.digest == looked.picture.file.digest


def _path(sample: Sample) -> Path:
    return sample.mask.path or sample.path


def _about(sample: Sample) -> tuple[Path, ...]:
    return () if sample.mask.path is None else (sample.path,)
