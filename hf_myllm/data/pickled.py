"""Token ids out of a pickle, without running what a pickle may ask to run.

A pickle is a program, and loading one calls whatever function it names. The [`_Unpickler`] here looks no name up: it
knows the few that lists, numpy arrays and torch tensors of numbers consist of, and refuses any other by its name.
"""

import collections
import io
import pickle
import zipfile

import numpy as np
import torch

from ..errors import InputError, first_line

_LARGEST = (1 << 32) - 1  # ids are kept in 32 bits at most


class _Refused(pickle.UnpicklingError):
    pass


def _latin1(text, encoding):
    """What old pickles of arrays keep their bytes with."""
    if encoding != "latin1" or not isinstance(text, str):
        raise _Refused("_codecs.encode with another encoding than latin1")
    return text.encode("latin1")


def _storage(content):
    """A tensor's numbers, which lie in a pickle as a file of torch's own kind."""
    return torch.load(io.BytesIO(content), weights_only=True)


def _known():
    arrays = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.int64(0).__reduce__()[0]}
    names = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _latin1}
    for core in ("numpy.core", "numpy._core"):  # before and after numpy 2
        names |= {(f"{core}.multiarray", name): function for name, function in arrays.items()}
        names[f"{core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]
    names["collections", "OrderedDict"] = collections.OrderedDict  # a tensor's empty set of hooks
    names["torch._utils", "_rebuild_tensor_v2"] = torch._utils._rebuild_tensor_v2
    names["torch.storage", "_load_from_bytes"] = _storage
    return names


class _Unpickler(pickle.Unpickler):
    known = _known()

    def find_class(self, module, name):
        if (module, name) in self.known:
            return self.known[module, name]
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid):
        raise _Refused("an object outside the file")


def read_ids(path):
    """The token ids in a pickle: a list, numpy array or torch tensor of them, or lists of such, joined in their order.

    Args:
        path: written by pickle.dump or torch.save.
    Returns:
        (ids,) uint16, or uint32 where an id needs it.
    Raises:
        InputError: the pickle asks for anything else, is damaged, or holds something other than token ids.
    """
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(path):  # torch.save's kind; weights_only is a restricted unpickler too
                content = torch.load(path, weights_only=True, map_location="cpu")
            else:
                content = _Unpickler(file).load()
    except _Refused as error:
        raise InputError(
            f"{path} is a pickle that asks for {error}, and is not loaded: only lists, numpy arrays and torch tensors "
            "of token ids are"
        ) from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        raise InputError(f"{path} cannot be read as a pickle of token ids: {first_line(error)[:200]}") from None
    chunks = []
    for part in _arrays(content, path):
        if part.dtype.kind not in "iu":
            raise InputError(f"{path} holds {part.dtype} numbers; token ids are whole numbers")
        flat = part.reshape(-1)
        if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) <= _LARGEST:
            place = int(np.argmax((flat < 0) | (flat > _LARGEST)))
            before = sum(len(chunk) for chunk in chunks)
            raise InputError(f"{path} has {flat[place]} at position {before + place}, which is no token id")
        chunks.append(flat.astype(np.uint16 if flat.size == 0 or int(flat.max()) < 1 << 16 else np.uint32))
    ids = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.uint16)
    if not len(ids):
        raise InputError(f"{path} holds no token ids")
    return ids


def _arrays(content, path):
    """The arrays that a list's, array's or tensor's numbers make, in order."""
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            yield item.detach().cpu().numpy() if item.dtype != torch.bfloat16 else np.empty(1)
        elif isinstance(item, (np.ndarray, np.integer)) and np.asarray(item).dtype.kind != "O":
            yield np.asarray(item)
        elif isinstance(item, (list, tuple, np.ndarray)):
            if all(type(value) is int for value in item):
                try:
                    yield np.array(item, dtype=np.int64)
                except OverflowError:
                    raise InputError(f"{path} has numbers too large to be token ids") from None
            else:
                pending += reversed(list(item))
        else:
            raise InputError(
                f"{path} holds a {type(item).__name__} ({item!r:.40}) where token ids should be: give a list, numpy "
                "array or torch tensor of them, or a list of those"
            )
