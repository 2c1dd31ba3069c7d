"""Run SCRIPT ARGUMENTS with accelerate's FSDP or DeepSpeed on the CPU, which it gives to GPUs alone."""

import os
import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def main() -> None:
    """Make accelerate treat these processes as it treats those of several GPUs, then run the script."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        AcceleratorState.__init__ = with_fsdp(AcceleratorState.__init__)
    else:
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    script = sys.argv.pop(1)
    sys.argv[0] = script
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def with_fsdp(init):
    """Return AcceleratorState's constructor with the branch for GPUs taken."""

    def started(self, *arguments, fsdp_plugin=None, **more):
        init(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    return started


if __name__ == "__main__":
    main()
