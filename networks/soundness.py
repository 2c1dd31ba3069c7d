"""What can be wrong with a file of trained weights, found before there is a model."""

from __future__ import annotations

from collections.abc import Sequence

from library.errors import CheckpointError
from networks import files

WHOLE_MODEL = (
    "model.diffusion_model.",
    "cond_stage_model.",
    "first_stage_model.",
    "conditioner.embedders.",
    "joint_blocks.",
    "text_encoders.",
)


def check(file: str, option: str, other_networks: Sequence[tuple[str, str, str]]) -> None:
    """Refuse a file that no run can go on from, whatever module made it.

    Args:
        file: of --network_weights or --base_weights.
        option: which of them, for messages.
        other_networks: (how a name in it starts, what such a file is, its training script), of other model families.

    Raises: CheckpointError for a file that is not readable, is no network's or one for another family, or holds
        numbers that are none; the message names the tensor.
    """
    tensors = files.read(file)
    for start, kind, script in other_networks:
        if any(name.startswith(start) for name in tensors):
            raise CheckpointError(f"{option} {file}: is {kind}. Train it with {script}.")
    if any(name.startswith(WHOLE_MODEL) for name in tensors):
        raise CheckpointError(
            f"{option} {file}: is a whole model. Give the file of a LoRA here, and a model to "
            "--pretrained_model_name_or_path."
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{option} {file}: {name} holds numbers that are infinite or none at all (NaN): the run that made it "
                "went wrong. Use an earlier file of it."
            )
