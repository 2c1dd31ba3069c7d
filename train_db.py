"""Train Stable Diffusion 1.x or 2.x itself, U-Net and text encoder: accelerate launch train_db.py --help."""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("train_db", "library.models.sd:Sd", method="library.training.full_model:FullModel"))
