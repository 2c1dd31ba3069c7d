"""Latents and masks kept between runs: the format, its validity, and the pass that fills it."""
