"""Train a LoRA on Stable Diffusion XL: accelerate launch sdxl_train_network.py --help."""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sdxl_train_network", "library.models.sdxl:Sdxl"))
