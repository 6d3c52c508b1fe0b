"""Runs a script on ranks without an accelerator, which torchtitan does not do by itself.

torchtitan asks torch for the accelerator there is, and takes "cuda" where there is none. Here it is
told of the CPU, with what `torch.cuda` has and `torch.cpu` has not. Gradients, which it does not
divide by the number of ranks, are added up by a plain sum in the place of NCCL's scaled one. The
rest is its own code.
"""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule

if __name__ == "__main__":
    torch.set_num_threads(1)
    utilities: Any = torch._utils
    utilities._get_available_device_type = lambda: "cpu"
    cpu: Any = torch.cpu
    memory = SimpleNamespace(total_memory=2**34)
    missing = {
        "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: memory,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda *_: None,
    }
    for name, function in missing.items():
        if not hasattr(cpu, name):
            setattr(cpu, name, function)
    cpu.current_device = lambda: 0  # a number, as barrier() wants it
    distributed: Any = torch.distributed
    if not hasattr(distributed, "set_timeout"):  # torchtitan 0.3 asks for a torch after 2.13
        distributed.set_timeout = distributed_c10d._set_pg_timeout
    sharded: Any = FSDPModule
    divide = sharded.set_gradient_divide_factor

    def by_sums(module: Any, factor: float) -> None:
        module.set_force_sum_reduction_for_comms(True)
        divide(module, factor)

    sharded.set_gradient_divide_factor = by_sums
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
