"""Pickles of token ids are read, and no other pickle is."""

import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from hf_myllm.data.pickled import read_ids
from hf_myllm.errors import InputError

IDS = [5, 0, 70000, 12, 7, 7]
CONTENTS = {
    "a list": IDS,
    "a tuple": tuple(IDS),
    "an array": np.array(IDS, dtype=np.int32),
    "an array, not contiguous": np.array([IDS, IDS]).T[:, 0],
    "a tensor": torch.tensor(IDS),
    "an int32 tensor": torch.tensor(IDS, dtype=torch.int32),
    "a two-dimensional tensor": torch.tensor(IDS).view(2, 3),
    "lists": [IDS[:2], [], IDS[2:]],
    "arrays": [np.array(IDS[:4]), np.array(IDS[4:], dtype=np.uint16)],
    "tensors": [torch.tensor(IDS[:1]), torch.tensor(IDS[1:])],
    "numpy's numbers": list(np.array(IDS)),
    "an array of arrays": np.array([np.array(IDS[:2]), np.array(IDS[2:])], dtype=object),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_lists_arrays_and_tensors(tmp_path, content, protocol):
    path = tmp_path / "ids.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    ids = read_ids(path)
    assert ids.dtype == np.uint32
    assert ids.tolist() == IDS


def test_what_torch_saves_and_small_ids(tmp_path):
    torch.save(torch.arange(10), tmp_path / "ids.pkl")
    ids = read_ids(tmp_path / "ids.pkl")
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(range(10))


class Command:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


REFUSED = {
    "a command": (Command(os.system, "touch PLACE"), "(posix|nt).system"),
    "a file": (Command(open, "PLACE", "w"), "io.open"),
    "code": (Command(eval, "open('PLACE', 'w')"), "(builtins|__builtin__).eval"),
    "an import by numpy's side": (Command(np.load, "PLACE"), "numpy.load"),
    "another codec": (Command(__import__("_codecs").encode, "x", "rot13"), "_codecs.encode"),
    "another class": (Counter(IDS), "collections.Counter"),
    "hidden in a list": ([IDS, [Command(os.system, "touch PLACE")]], "(posix|nt).system"),
}


@pytest.mark.parametrize(("content", "name"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_tries_anything_else_is_refused_by_name(tmp_path, content, name, protocol):
    path, place = tmp_path / "ids.pkl", str(tmp_path / "touched")
    data = pickle.dumps(content, protocol=protocol)
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"asks for {name}"):
        read_ids(path)
    assert not os.path.exists(place)


def test_a_tensor_that_hides_a_pickle_is_refused(tmp_path):
    import io

    inner = io.BytesIO()
    torch.save({"x": Command(os.system, f"touch {tmp_path / 'touched'}")}, inner)
    path = tmp_path / "ids.pkl"
    path.write_bytes(pickle.dumps(Command(torch.storage._load_from_bytes, inner.getvalue())))
    with pytest.raises(InputError, match=r"cannot be read|asks for"):
        read_ids(path)
    torch.save(Command(os.system, f"touch {tmp_path / 'touched'}"), path)
    with pytest.raises(InputError, match=r"cannot be read|asks for"):
        read_ids(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, -5], "-5 at position 2"),
        ([[1, 2], [3, 1 << 33]], "8589934592 at position 3"),
        ([1, 1 << 70], "too large"),
        ([1.0, 2.0], "holds a float"),
        (np.array([1.5]), "float64 numbers"),
        (np.array([True]), "bool numbers"),
        (torch.tensor([0.5]), "float32 numbers"),
        ([True, False], "holds a bool"),
        (["a"], "holds a str"),
        ({"ids": IDS}, "holds a dict"),
        ([], "no token ids"),
        (None, "holds a NoneType"),
    ],
    ids=str,
)
def test_what_is_not_token_ids(tmp_path, content, message):
    path = tmp_path / "ids.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message):
        read_ids(path)


@pytest.mark.parametrize(
    "data", [b"", b"not a pickle", pickle.dumps(IDS)[:-3], b"\x80\x05]" + b"]" * 50, b"PK\x03\x04"]
)
def test_damaged_pickles(tmp_path, data):
    path = tmp_path / "ids.pkl"
    path.write_bytes(data)
    with pytest.raises(InputError, match="ids.pkl"):
        read_ids(path)
