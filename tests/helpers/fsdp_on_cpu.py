"""
Run a script under FSDP on CPU: python fsdp_on_cpu.py SCRIPT OPTIONS...

Accelerate disables FSDP without an accelerator, although PyTorch's FSDP runs over gloo. This script enables it.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


initialise = AcceleratorState.__init__


def initialise_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if hasattr(self, "fsdp_plugin"):
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = initialise_with_fsdp
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
