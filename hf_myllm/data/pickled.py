"""Token ids out of a pickle, without running what a pickle may ask to run.

A pickle is a program, and loading one calls whatever it names, with arguments of its own choosing. Here a name stands
for nothing but a part of this file: what a list, numpy array or torch tensor of numbers consists of is described by
inert objects, from which [`read_token_ids`] makes arrays itself. Any other name is refused.
"""

import io
import math
import os
import pickle
import pickletools
import re
import zipfile

import numpy as np
import torch

from ..errors import DataError, first_line

_LARGEST = (1 << 32) - 1  # ids are kept in 32 bits at most
_INTEGERS = {
    torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64,
}  # fmt: skip


class _Refused(Exception):
    """What a pickle asked for."""


class _Type:
    """Of numpy's types of numbers, the plain ones; "O" stands for a list in an array's clothes."""

    def __init__(self, name, align=False, copy=False):
        if not isinstance(name, str) or not re.fullmatch(r"[iuf][1248]|b1|O8?", name):
            raise _Refused(f"numbers of type {name!r:.40}")
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numbers(self, data, shape, order="C"):
        if self.name.startswith("O"):
            return list(data) if isinstance(data, list) else _refuse("an array of objects from bytes")
        if isinstance(data, str):  # how the oldest protocol keeps bytes
            data = data.encode("latin1")
        if not isinstance(data, (bytes, bytearray)):
            raise _Refused("an array without bytes")
        flat = np.frombuffer(bytes(data), dtype=np.dtype(self.order + self.name))
        if math.prod(shape) != flat.size or min(shape, default=0) < 0:
            raise _Refused(f"an array of shape {shape!r:.40} from {flat.size} numbers")
        return flat.reshape(shape, order=order)


class _Array:
    """An array, once its state has been given."""

    content = None

    def __setstate__(self, state):
        _, shape, kind, is_fortran, data = state
        self.content = kind.numbers(data, tuple(shape), "F" if is_fortran else "C")


def _refuse(what):
    raise _Refused(what)


def _reconstruct(kind, shape, letter):
    return _Array()


def _frombuffer(data, kind, shape, order):
    array = _Array()
    array.content = kind.numbers(data, tuple(shape), order)
    return array


def _scalar(kind, data):
    return int(kind.numbers(data, (1,))[0]) if not kind.name.startswith(("O", "f", "b")) else _refuse("a scalar")


def _encode(text, encoding):
    """What old pickles of arrays keep their bytes with."""
    if encoding != "latin1" or not isinstance(text, str):
        raise _Refused("_codecs.encode with another encoding than latin1")
    return text.encode("latin1")


def _load_from_bytes(content):
    """A tensor's numbers, which lie in a pickle as a file of torch's own kind; weights_only restricts it likewise."""
    storage = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    if not isinstance(storage, torch.storage.TypedStorage) or storage.dtype not in _INTEGERS:
        raise _Refused("a tensor of anything but whole numbers")
    return storage


def _rebuild_tensor(storage, offset, size, stride, *rest):
    if not isinstance(storage, torch.storage.TypedStorage) or math.prod(size) > len(storage):
        raise _Refused("a tensor with more numbers than it has")
    flat = torch.empty(0, dtype=storage.dtype).set_(storage.untyped(), 0, (len(storage),))
    array = _Array()
    array.content = torch.as_strided(flat, tuple(size), tuple(stride), offset).numpy()  # raises beyond the storage
    return array


class _Name:
    """What a name stands for. It can be called, and not be changed."""

    __slots__ = ("make",)

    def __init__(self, make):
        self.make = make

    def __call__(self, *arguments):
        return self.make(*arguments)

    def __setstate__(self, state):
        raise _Refused("a change of what reads it")


_KNOWN = {
    ("numpy", "ndarray"): lambda *arguments: _refuse("numpy.ndarray"),  # only ever handed to _reconstruct
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): lambda: None,  # a tensor's hooks, of which it has none
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
}
for _core in ("numpy.core", "numpy._core"):  # before and after numpy 2
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _KNOWN[f"{_core}.multiarray", "scalar"] = _scalar
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return _Name(_KNOWN[module, name]) if (module, name) in _KNOWN else _refuse(f"{module}.{name}")

    def persistent_load(self, pid):
        raise _Refused("an object outside the file")


def read_token_ids(path):
    """The token ids in a pickle: a list, numpy array or torch tensor of them, or lists of such, joined in their order;
    of several pickles in one file, one after another.

    Args:
        path: written by pickle.dump or torch.save.
    Returns:
        (ids,) uint16, or uint32 where an id needs it.
    Raises:
        DataError: the pickle asks for anything else, is damaged, or holds something other than token ids.
    """
    try:
        contents = _load(path)
        chunks = [_check(part, path) for part in _arrays(contents, os.path.getsize(path))]
    except DataError:
        raise
    except _Refused as error:
        raise DataError(
            f"{path} is a pickle that asks for {error}, and is not loaded: only lists, numpy arrays and torch tensors "
            "of token ids are"
        ) from None
    except (Exception, MemoryError) as error:  # a damaged pickle fails in as many ways as there are instructions
        raise DataError(f"{path} cannot be read as a pickle of token ids: {first_line(error)[:200]}") from None
    if not sum(map(len, chunks)):
        raise DataError(f"{path} holds no token ids")
    for number, chunk in enumerate(chunks):
        wrong = (chunk < 0) | (chunk > _LARGEST)
        if wrong.any():
            place = int(np.argmax(wrong))
            before = sum(map(len, chunks[:number]))
            raise DataError(f"{path} has {chunk[place]} at position {before + place}, which is no token id")
    is_small = max(int(chunk.max(initial=0)) for chunk in chunks) < 1 << 16
    return np.concatenate([chunk.astype(np.uint16 if is_small else np.uint32) for chunk in chunks])


def _load(path):
    if zipfile.is_zipfile(path):  # torch.save's kind; weights_only is a restricted unpickler too
        return [torch.load(path, weights_only=True, map_location="cpu")]
    contents, size = [], os.path.getsize(path)
    with open(path, "rb") as file:
        while file.peek(1):
            start = file.tell()
            # the unpickler makes room for as many things as the largest number that one is remembered by
            if any("PUT" in code.name and number > size for code, number, _ in pickletools.genops(file)):
                raise _Refused("memory for more than it has bytes")
            file.seek(start)
            contents.append(_Unpickler(file).load())
            if contents == [torch.serialization.MAGIC_NUMBER]:  # torch.save's kind of old
                return [torch.load(path, weights_only=True, map_location="cpu")]
    return contents


def _arrays(content, most):
    """The arrays that a list's, array's or tensor's numbers make, in order.

    Args:
        most: how many things may be in it; a file in which a list stands for itself many times holds more than bytes.
    """
    pending, seen = [content], 0
    while pending:
        item = pending.pop()
        item = item.content if isinstance(item, _Array) else item
        if isinstance(item, torch.Tensor):
            if item.dtype not in _INTEGERS or item.layout != torch.strided or item.device.type != "cpu":
                raise _Refused(f"a {item.dtype} tensor")
            item = item.detach().numpy()
        is_flat = isinstance(item, (list, tuple)) and all(type(value) is int for value in item)
        seen += len(item) if is_flat else item.size if isinstance(item, np.ndarray) else 1
        if seen > most + len(pending):
            raise _Refused("more numbers than it has bytes")
        if is_flat:
            yield np.array(item, dtype=object if max(map(abs, item), default=0) >> 62 else np.int64)
        elif isinstance(item, np.ndarray):
            yield item.reshape(-1)
        elif type(item) is int:
            yield np.array([item])
        elif isinstance(item, (list, tuple)):
            pending += reversed(item)
            if len(pending) > 2 * most:
                raise _Refused("more numbers than it has bytes")
        else:
            kind = type(item).__name__
            raise TypeError(f"it holds a {kind} where token ids should be; give lists, numpy arrays or torch tensors")


def _check(part, path):
    if part.dtype == object:
        raise DataError(f"{path} has numbers too large to be token ids")
    if part.dtype.kind not in "iu":
        raise DataError(f"{path} holds {part.dtype} numbers; token ids are whole numbers")
    return part
