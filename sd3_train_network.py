"""Train a LoRA on Stable Diffusion 3 or 3.5: accelerate launch sd3_train_network.py --help."""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sd3_train_network", "library.models.sd3:Sd3"))
