"""What save_pretrained writes, in parts: the small files at once, and the weights when somebody writes them."""

import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CheckpointError
from ..files import PARTIAL, write_and_digest
from . import lora

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_DTYPES = {  # in the order in which safetensors stores them, last first: the larger are aligned then
    **{torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8"},
    **{torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3"},
    **{torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"},
}


def save_without_weights(model, folder):
    """Write all files of a model or an adapter but its weights."""
    if lora.is_added(model):
        lora.save(model, folder, {name: torch.empty(0) for name in model.state_dict()})
        (folder / lora.WEIGHTS).unlink()
    else:
        model.save_pretrained(folder, state_dict={})


def read_small_files(write, run_dir):
    """Return what `write(folder)` writes to a temporary folder of a run, as bytes by name."""
    try:
        with tempfile.TemporaryDirectory(PARTIAL, "checkpoint-", run_dir) as folder:
            write(Path(folder))
            paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    except OSError as error:
        raise CheckpointError(f"{run_dir}: no checkpoint can be saved: {error}; try again") from None


def weights_file(model):
    """Return the name of the file of a model's or an adapter's weights."""
    return lora.WEIGHTS if lora.is_added(model) else SAFE_WEIGHTS_NAME


def weight_files(folder, names=(SAFE_WEIGHTS_NAME,)):
    """Return the safetensors files of a folder's model: the shards that its index names or, without an index, the first
    of these names that is there."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return [folder / name for name in names if (folder / name).is_file()][:1]


def weights_to_save(model):
    """Return the weights of a model or an adapter as they are in memory, each once: a flat dict of tensors."""
    if lora.is_added(model):
        return lora.weights(model)
    ignored = model._keys_to_ignore_on_save or ()
    weights = {name: weight for name, weight in model.state_dict().items() if name not in ignored}
    if is_sharded(weights):
        return {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}
    return remove_tied_weights_from_state_dict(weights, model)


def is_sharded(weights):
    return any(isinstance(weight, torch.distributed.tensor.DTensor) for weight in weights.values())


def as_stored(model, weights):
    """Return weights of [`weights_to_save`] with the names and the layout of the stock class."""
    return weights if lora.is_added(model) else revert_weight_conversion(model, weights)


def partition(weights, count):
    """Divide weights into at most `count` parts of about as many bytes; return the names of each part.

    The weights of a module and of its children stay together: a stock layout may join or divide them.
    """
    groups, parts = defaultdict(list), [(0, index, []) for index in range(count)]
    for name in weights:
        groups[name.rsplit(".", 2)[0]].append(name)
    sizes = {group: sum(weights[name].nbytes for name in names) for group, names in groups.items()}
    for group in sorted(groups, key=sizes.get, reverse=True):
        size, index, names = min(parts)
        parts[index] = size + sizes[group], index, names + groups[group]
    return [names for _, _, names in parts if names]


def write_safetensors(path, tensors, must_stop=lambda: False):
    """Write tensors on the host as safetensors.save_file does, and return the file's size and SHA-256 digest.

    Unlike safetensors, it hashes while it writes, flushes, and lets other threads run; see
    [`~hf_myllm.files.write_and_digest`].
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise SafetensorError(f"{name}: {tensor.dtype} cannot be stored")
    order = list(_DTYPES)
    ordered = sorted(tensors.items(), key=lambda item: (-order.index(item[1].dtype), item[0]))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def blocks():
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            yield memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())

    return write_and_digest(path, blocks(), must_stop)


def is_large(model):
    """Return whether it may take ten seconds to write a model."""
    return sum(parameter.numel() for parameter in model.parameters()) > 2e8
