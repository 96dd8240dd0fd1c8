"""Read token ids from a pickle without running what the pickle may ask to run.

A pickle is a program: loading one calls whatever it names, with any arguments. Here a name stands only for a function
of this file, and these rebuild lists, numpy arrays and torch tensors of numbers. Any other name is refused.
"""

import io
import math
import os
import pickle
import pickletools
import re
import zipfile
from functools import partial

import numpy as np
import torch

from ..errors import DataError, first_line

_MAX_ID = (1 << 32) - 1
_INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("u", "") for bits in (8, 16, 32, 64)}


class _RefusedError(Exception):
    """The pickle asks for something else than numbers; the message names it."""


class _DType:
    """A numpy type of plain numbers, or "O": an array of objects, whose content a pickle stores as a list."""

    byte_order = "="

    def __init__(self, name, align=False, copy=False):
        if not isinstance(name, str) or not re.fullmatch(r"[iuf][1248]|b1|O8?", name):
            raise _RefusedError(f"numbers of type {name!r:.40}")
        self.name = name

    def __setstate__(self, state):
        self.byte_order = state[1] if state[1] in ("<", ">") else "="

    def numbers(self, data, shape, order="C"):
        if self.name.startswith("O"):
            if not isinstance(data, list):
                raise _RefusedError("an array of objects from bytes")
            return list(data)
        if isinstance(data, str):  # protocol 0
            data = data.encode("latin1")
        if not isinstance(data, (bytes, bytearray)):
            raise _RefusedError("an array without bytes")
        flat = np.frombuffer(bytes(data), dtype=self.byte_order + self.name)
        if math.prod(shape) != flat.size or min(shape, default=0) < 0:
            raise _RefusedError(f"an array of shape {shape!r:.40} from {flat.size} numbers")
        return flat.reshape(shape, order=order)


class _Array:
    """An array or tensor. The pickle of an array creates it empty and sets its state later."""

    def __init__(self, content=None):
        self.content = content

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        self.content = dtype.numbers(data, tuple(shape), "F" if is_fortran else "C")


def _ndarray(*args):
    raise _RefusedError("numpy.ndarray")  # a valid pickle only passes the class to _reconstruct


def _encode(text, encoding):
    if encoding != "latin1" or not isinstance(text, str):  # protocols 0 to 2 store bytes so
        raise _RefusedError("_codecs.encode with another encoding than latin1")
    return text.encode("latin1")


def _load_from_bytes(content):
    storage = _load_torch(io.BytesIO(content), len(content))
    if not isinstance(storage, torch.storage.TypedStorage) or storage.dtype not in _INTEGERS:
        raise _RefusedError("a tensor of anything but whole numbers")
    return storage


def _rebuild_tensor(storage, offset, size, stride, *rest):
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _RefusedError("a tensor without numbers")
    untyped = storage._untyped_storage  # the public methods of TypedStorage warn that it is deprecated
    count = untyped.nbytes() // storage.dtype.itemsize
    if math.prod(size) > count:
        raise _RefusedError("a tensor with more numbers than it has")
    flat = torch.empty(0, dtype=storage.dtype).set_(untyped, 0, (count,))
    return _Array(torch.as_strided(flat, tuple(size), tuple(stride), offset).numpy())  # raises beyond the storage


_FUNCTIONS = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): lambda: None,  # the hooks of a tensor, of which there are none
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _FUNCTIONS[f"{_core}.multiarray", "_reconstruct"] = lambda array_class, shape, typecode: _Array()
    _FUNCTIONS[f"{_core}.multiarray", "scalar"] = lambda dtype, data: dtype.numbers(data, (1,)).item()
    _FUNCTIONS[f"{_core}.numeric", "_frombuffer"] = lambda data, dtype, shape, order: _Array(
        dtype.numbers(data, tuple(shape), order)
    )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _FUNCTIONS:
            raise _RefusedError(f"{module}.{name}")
        return partial(_FUNCTIONS[module, name])  # a copy: a pickle can set attributes of what it loads

    def persistent_load(self, pid):
        raise _RefusedError("an object outside the file")


def read_token_ids(path):
    """Return the token ids in a pickle: a list, numpy array or torch tensor, or lists of these, joined in order.

    Args:
        path: a file written by pickle.dump, also several times, or by torch.save.
    Returns:
        (ids,) uint16, or uint32 if an id needs it.
    Raises:
        DataError: the pickle asks for anything else, is damaged, or holds something other than token ids.
    """
    try:
        chunks = list(_flatten(_load(path), os.path.getsize(path)))
    except _RefusedError as error:
        raise DataError(
            f"{path} is a pickle that asks for {error}, and is not loaded: only lists, numpy arrays and torch tensors "
            "of token ids are"
        ) from None
    except (Exception, MemoryError) as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} cannot be read as a pickle of token ids: {first_line(error)[:200]}") from None
    if not sum(map(len, chunks)):
        raise DataError(f"{path} holds no token ids")
    position = 0
    for chunk in chunks:
        if chunk.dtype == object:
            raise DataError(f"{path} has numbers too large to be token ids")
        if chunk.dtype.kind not in "iu":
            raise DataError(f"{path} holds {chunk.dtype} numbers; token ids are whole numbers")
        wrong = np.flatnonzero((chunk < 0) | (chunk > _MAX_ID))
        if len(wrong):
            raise DataError(f"{path} has {chunk[wrong[0]]} at position {position + wrong[0]}, which is no token id")
        position += len(chunk)
    is_small = max(int(chunk.max(initial=0)) for chunk in chunks) < 1 << 16
    return np.concatenate([chunk.astype(np.uint16 if is_small else np.uint32) for chunk in chunks])


def _load(path):
    """Return the objects of the pickles in a file."""
    if zipfile.is_zipfile(path):
        return [_load_torch(path, os.path.getsize(path))]
    contents, size = [], os.path.getsize(path)
    with open(path, "rb") as file:
        while file.peek(1):
            start = file.tell()
            # pickle allocates as many slots as the largest index that an object is stored under
            if any("PUT" in opcode.name and index > size for opcode, index, _ in pickletools.genops(file)):
                raise _RefusedError("memory for more than it has bytes")
            file.seek(start)
            contents.append(_Unpickler(file).load())
            if contents == [torch.serialization.MAGIC_NUMBER]:  # the old format of torch.save
                return [_load_torch(path, size)]
    return contents


def _load_torch(file, size):
    """Return what torch.save wrote; weights_only is a restricted unpickler too."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:  # torch.save compresses nothing
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise _RefusedError("more bytes than it has, compressed")
    if hasattr(file, "seek"):
        file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def _flatten(content, size):
    """Yield the numbers of lists, arrays and tensors in order, as one-dimensional arrays.

    Args:
        size: of the file in bytes. A list that contains itself, or another one many times, has more numbers than that.
    """
    pending, num_seen = [content], 0
    while pending:
        item = pending.pop()
        if isinstance(item, _Array):
            item = item.content
        if isinstance(item, torch.Tensor):
            if item.dtype not in _INTEGERS or item.layout != torch.strided or item.device.type != "cpu":
                raise _RefusedError(f"a {item.dtype} tensor")
            item = item.detach().numpy()
        is_list = isinstance(item, (list, tuple))
        is_flat = is_list and all(type(value) is int for value in item)
        num_seen += len(item) if is_flat else item.size if isinstance(item, np.ndarray) else 1
        if num_seen > size + len(pending) or (is_list and len(pending) + len(item) > 2 * size):
            raise _RefusedError("more numbers than it has bytes")
        if is_flat:
            yield np.array(item, dtype=object if max(map(abs, item), default=0) >> 62 else np.int64)
        elif is_list:
            pending += reversed(item)
        elif isinstance(item, np.ndarray):
            yield item.reshape(-1)
        elif type(item) is int:
            yield np.array([item])
        else:
            name = type(item).__name__
            raise TypeError(f"it holds a {name} where token ids should be; give lists, numpy arrays or torch tensors")
