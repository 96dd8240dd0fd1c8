"""Lets accelerate shard on a CPU, for tests of FSDP2 by real processes: it would train by DDP there instead.

torch's fully_shard works on a CPU with gloo; only accelerate's choice between DDP and FSDP asks for a GPU. Started in
place of hf_myllm.train: `accelerate launch --config_file accelerate_configs/fsdp2.yaml tests/distributed/sharding.py`.
"""

import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def shard_on_cpu(self, *arguments, fsdp_plugin=None, **options):
    _init(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type


AcceleratorState.__init__ = shard_on_cpu

if __name__ == "__main__":
    from hf_myllm.cli import main

    main(["train", *sys.argv[1:]])
