"""`sap-fast` for a launcher that asks for FSDP2, on ranks without an accelerator."""

import gc
import os

import torch.distributed as dist

from sap_fast.cli import main
from tests.cli.test_ranks import shard_on_cpus

if __name__ == "__main__":
    dist.init_process_group("gloo")
    shard_on_cpus()
    status = 0
    try:
        main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    gc.collect()
    dist.destroy_process_group()
    # Without the end of the interpreter, as on the ranks of `tests.ranks`.
    os._exit(status)
