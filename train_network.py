"""Train a LoRA on Stable Diffusion 1.x or 2.x: accelerate launch train_network.py --help."""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("train_network", "library.models.sd:Sd"))
