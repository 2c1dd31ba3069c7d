"""Training of Stable Diffusion on masked pictures: dataset, cache, losses, models and the loop."""
