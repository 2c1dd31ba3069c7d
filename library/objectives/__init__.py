"""What the denoiser is asked to predict: how latents are noised, and how the answer is compared and weighed."""
