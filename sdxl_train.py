"""Train SDXL itself, its U-Net and on demand its text encoders: accelerate launch sdxl_train.py --help."""

import sys

from library.cli import main

if __name__ == "__main__":
    sys.exit(main("sdxl_train", "library.models.sdxl:Sdxl", method="library.training.full_model:FullModel"))
