"""Parameters sharded over the ranks (FSDP2), and a rank's rows of them."""

import ctypes
import math
from contextlib import suppress

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .precision import layers


def shard_model(accelerator, model, compile_model):
    """Shard a model's parameters over the ranks with FSDP2: each layer is gathered when it runs.

    Calls torch's fully_shard with accelerate's settings. accelerate's own path shards embeddings and head separately,
    which fails where they share more than one parameter (BERT), and reduces gradients in bfloat16. Embeddings and head
    are gathered with the root module.

    With accelerate's `dp_replicate_size` above 1 (HSDP) the parameters are sharded over each group of `dp_shard_size`
    ranks and replicated over the groups.

    Of a model on the meta device, each rank then makes its own rows only, as the model's `read_rows` returns them; see
    [`~hf_myllm.models.loading.build_model`].
    """
    plugin = accelerator.state.fsdp_plugin
    param_dtype = {"no": None, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    options = {"mp_policy": policy, "offload_policy": plugin.cpu_offload}
    mesh = accelerator.torch_device_mesh
    if mesh is not None and {"dp_replicate", "dp_shard"} <= set(mesh.mesh_dim_names or ()):  # HSDP
        options["mesh"] = mesh["dp_replicate", "dp_shard"]
    whole = (
        model.get_base_model() if hasattr(model, "get_base_model") else model
    )  # without the adapter of LoRA around it
    for layer in layers(whole):
        if compile_model:
            layer.compile()
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **options)
    if compile_model and hasattr(whole, "compute_loss"):  # uncompiled, it stores logits and their gradient in fp32
        whole.compute_loss = torch.compile(whole.compute_loss)
    fully_shard(whole, **options)
    if "read_rows" in vars(model):
        device = torch.device("cpu") if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else accelerator.device
        _fill(model, vars(model).pop("read_rows"), device)


def _fill(model, read_rows, device):
    """Give the parameters of a model on the meta device this rank's rows.

    Args:
        read_rows: called with a parameter's name, the first row and the end.
    """
    parameters = {}
    for name, parameter in model.named_parameters():
        rows = read_rows(name, *local_rows(parameter)).to(device)
        parameters[parameter] = torch.nn.Parameter(to_sharded(rows, parameter), parameter.requires_grad)
        with suppress(AttributeError, OSError):  # without glibc
            ctypes.CDLL(None).malloc_trim(0)  # give back what was freed in between
    named = model.named_parameters(remove_duplicate=False)
    # A hook of FSDP2 takes the new parameters over.
    model.load_state_dict({name: parameters[parameter] for name, parameter in named}, strict=False, assign=True)


def to_local(tensor):
    """Return this rank's rows of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor):
    """Return all rows of a tensor that may be sharded. A collective: all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter):
    """Return (start, stop) of this rank's rows of a parameter; fully_shard divides rows as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return 0, None
    mesh, num_rows, dim = parameter.device_mesh, len(parameter), _shard_dim(parameter)
    rows_per_rank = math.ceil(num_rows / mesh.size(dim))
    start = min(num_rows, mesh.get_local_rank(dim) * rows_per_rank)
    return start, min(num_rows, start + rows_per_rank)


def num_shards(model):
    """Return over how many ranks a model's parameters are sharded; each further group of ranks holds a replica."""
    parameter = next(model.parameters())
    return parameter.device_mesh.size(_shard_dim(parameter)) if isinstance(parameter, DTensor) else 1


def _shard_dim(parameter):
    """Return the dimension of the mesh over which a parameter is sharded."""
    return next(index for index, placement in enumerate(parameter.placements) if placement.is_shard())


def to_sharded(rows, parameter):
    """Return this rank's rows as part of a DTensor sharded like the parameter."""
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(rows, mesh, parameter.placements, shape=shape, stride=stride, run_check=False)
