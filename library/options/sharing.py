"""What cannot be done where processes share out weights, gradients or the optimizer's state: DeepSpeed and FSDP."""

from __future__ import annotations

from collections.abc import Iterator

from library.errors import OptionError
from library.options.declare import declared
from library.options.deepspeed import DeepSpeedOptions
from library.options.groups import Options

# DeepSpeed hands an optimizer flat pieces of the weights, and each process only its own.
NEED_MATRICES = ("adafactor", "muon")
OFFLOADED = ("adamw", "adam", "torch.optim.adamw", "torch.optim.adam")  # DeepSpeed puts its own Adam in their place
ADAPT_RATE = ("dadapt", "prodigy")
EIGHT_BIT = ("8bit", "paged", "bitsandbytes")


def check_deepspeed(options: Options) -> None:
    """Refuse options that do not go with --deepspeed.

    Raises: OptionError.
    """
    deepspeed, optimizer = options.deepspeed, (options.optimizer.optimizer_type or "AdamW")
    if not deepspeed.deepspeed:
        return
    check_sharing(options, "--deepspeed")
    for name in ("save_state", "save_state_on_train_end", "resume"):
        if getattr(options.saving, name):
            raise OptionError(
                f"--{name} does not go with --deepspeed: no process has the optimizer's whole state. Leave it out; "
                "--network_weights, or --pretrained_model_name_or_path for a whole model, goes on from a saved file."
            )
    if deepspeed.zero_stage > 0 and ("schedulefree" in optimizer.lower() or optimizer.lower() in NEED_MATRICES):
        raise OptionError(
            f"--optimizer_type {optimizer} needs whole weights, and --zero_stage {deepspeed.zero_stage} gives it flat "
            "pieces. Use AdamW, or --zero_stage 0."
        )
    if deepspeed.offload_optimizer_device and optimizer.lower() not in OFFLOADED:
        raise OptionError(
            f"--offload_optimizer_device: DeepSpeed would run its own Adam in place of {optimizer}. "
            "Use AdamW, or leave it out."
        )
    sampling = options.sampling
    if deepspeed.zero_stage == 3 and (
        sampling.sample_at_first or sampling.sample_every_n_steps or sampling.sample_every_n_epochs
    ):
        raise OptionError(
            "--zero_stage 3 has no weights for sample pictures, as the processes draw different ones. "
            "Use --zero_stage 2, or draw them later from the saved files."
        )
    if deepspeed.fp16_master_weights_and_gradients and options.training.mixed_precision != "fp16":
        raise OptionError(
            "--fp16_master_weights_and_gradients needs --mixed_precision fp16, "
            f"got {options.training.mixed_precision}. Change one of them."
        )


def check_sharing(options: Options, way: str) -> None:
    """Refuse options that need what no process has whole.

    Args:
        options: of the run.
        way: how things are shared out, as the user asked for it.

    Raises: OptionError.
    """
    optimizer = (options.optimizer.optimizer_type or "AdamW").lower()
    for name in ("fused_backward_pass", "fused_optimizer_groups"):
        if getattr(options.optimizer, name):
            raise OptionError(f"--{name} does not go with {way}, which steps in its own way. Leave it out.")
    if options.training.ema_decay is not None:
        raise OptionError(
            f"--ema_decay does not go with {way}: a process may have only a part of the weights. Leave it out."
        )
    if options.network.scale_weight_norms:
        raise OptionError(
            f"--scale_weight_norms does not go with {way}, which keeps copies of the weights. Leave it out."
        )
    if any(text.strip().startswith("module_dropout") for text in options.network.network_args or ()):
        raise OptionError(
            f"--network_args module_dropout does not go with {way}: the processes must all use the same modules. "
            "Use network_dropout or rank_dropout."
        )
    if any(part in optimizer for part in ADAPT_RATE):
        raise OptionError(
            f"--optimizer_type {options.optimizer.optimizer_type} does not go with {way}: each process would find "
            "another learning rate. Use AdamW."
        )
    if way != "--deepspeed" and any(part in optimizer for part in EIGHT_BIT):
        raise OptionError(
            f"--optimizer_type {options.optimizer.optimizer_type} does not go with {way}, whose weights "
            "bitsandbytes cannot read. Use AdamW."
        )
    if way != "--deepspeed" and (optimizer == "adafactor" or optimizer.startswith("transformers.")):
        raise OptionError(
            f"--optimizer_type {options.optimizer.optimizer_type} does not go with {way}: that of transformers cannot "
            "work on parts of weights. Use AdamW."
        )


def idle_deepspeed_options(options: Options) -> Iterator[str]:
    """Yield a warning for each option that has no effect without --deepspeed."""
    if options.deepspeed.deepspeed:
        return
    for each in declared(DeepSpeedOptions):
        if getattr(options.deepspeed, each.name) != each.default:
            yield f"--{each.name} has no effect without --deepspeed"
