"""Tiny Stable Diffusion checkpoints in the true layouts, written once a session."""

import functools
import tempfile
from pathlib import Path

from examples.embedded_model import sd3, sdxl
from examples.embedded_model.make import Size, write, write_diffusers

SD15 = Size(unet=(64, 32, 64, 64), vae=(32, 64, 32, 32), text=32)
SD21 = Size(unet=(64, 32, 64, 64), vae=(32, 64, 32, 32), text=32, text_layers=23, v2=True)
SDXL = sdxl.SdxlSize(unet=(32, 64, 64), vae=(32, 64, 32, 32), text=(32, 48))
SD3 = {kind: sd3.Sd3Size(kind, vae=(32, 64, 32, 32)) for kind in ("medium", "5-medium", "5-large")}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny-models-")  # removed when the process ends


@functools.cache
def tiny_sd15() -> Path:
    """Return a tiny SD 1.5 checkpoint in the original layout, float32. Do not change the file."""
    return write(Path(_folder().name) / "sd15.safetensors", precision="float", size=SD15)


@functools.cache
def tiny_sd21() -> Path:
    """Return a tiny SD 2.1 checkpoint in the original layout, float32. Do not change the file."""
    return write(Path(_folder().name) / "sd21.safetensors", precision="float", size=SD21)


@functools.cache
def tiny_sd15_folder() -> Path:
    """Return the diffusers folder of the same model as `tiny_sd15`. Do not change the files."""
    return write_diffusers(Path(_folder().name) / "sd15", precision="float", size=SD15)


@functools.cache
def tiny_sd21_folder() -> Path:
    """Return the diffusers folder of the same model as `tiny_sd21`. Do not change the files."""
    return write_diffusers(Path(_folder().name) / "sd21", precision="float", size=SD21)


@functools.cache
def tiny_sdxl() -> Path:
    """Return a tiny SDXL checkpoint in the original layout, float32. Do not change the file."""
    return sdxl.write(Path(_folder().name) / "sdxl.safetensors", precision="float", size=SDXL)


@functools.cache
def tiny_sdxl_folder() -> Path:
    """Return the diffusers folder of the same model as `tiny_sdxl`. Do not change the files."""
    return sdxl.write_diffusers(Path(_folder().name) / "sdxl", precision="float", size=SDXL)


@functools.cache
def tiny_sd3(kind: str) -> Path:
    """Return a tiny SD3 ("medium") or SD3.5 ("5-medium", "5-large") with everything in one file, float32.

    Do not change the file.
    """
    return sd3.write(Path(_folder().name) / f"sd3{kind}.safetensors", precision="float", size=SD3[kind])


@functools.cache
def tiny_sd3_apart(kind: str) -> Path:
    """Return a folder with model, clip_l, clip_g, t5xxl and vae .safetensors of `tiny_sd3`. Do not change the files."""
    return sd3.write_apart(Path(_folder().name) / f"sd3{kind}", precision="float", size=SD3[kind])


@functools.cache
def tiny_sd3_folder(kind: str) -> Path:
    """Return the diffusers folder of the same model as `tiny_sd3`. Do not change the files."""
    return sd3.write_diffusers(Path(_folder().name) / f"sd3{kind}diffusers", precision="float", size=SD3[kind])
