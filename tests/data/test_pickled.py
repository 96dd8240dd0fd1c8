"""Pickles of token ids are read, and every other pickle is refused."""

import io
import os
import pickle
import subprocess
import sys
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT

from hf_myllm.data.pickled import read_token_ids
from hf_myllm.errors import DataError

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
    ids = read_token_ids(path)
    assert ids.dtype == np.uint32
    assert ids.tolist() == IDS


def test_a_file_of_torch_save_and_small_ids(tmp_path):
    torch.save(torch.arange(10), tmp_path / "ids.pkl")
    ids = read_token_ids(tmp_path / "ids.pkl")
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(range(10))


class Command:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


SCALAR, FROMBUFFER = np.int64(0).__reduce__()[0], np.empty(0).__reduce_ex__(5)[0]


def billion_laughs():
    nested = [1] * 10
    for _ in range(9):
        nested = [nested] * 10
    return pickle.dumps(nested)


def set_state(command, state):
    class Built(Command):
        def __reduce__(self):
            return (*command.__reduce__()[:2], state)

    return Built(None)


REFUSED = {
    "a command": (Command(os.system, "touch TOUCHED"), "(posix|nt).system"),
    "a file": (Command(open, "TOUCHED", "w"), "_?io.open"),
    "code": (Command(eval, "open('TOUCHED', 'w')"), "(builtins|__builtin__).eval"),
    "another function of numpy": (Command(np.load, "TOUCHED"), "numpy.load"),
    "another codec": (Command(__import__("_codecs").encode, "x", "rot13"), "_codecs.encode"),
    "another class": (Counter(IDS), "collections.Counter"),
    "hidden in a list": ([IDS, [Command(os.system, "touch TOUCHED")]], "(posix|nt).system"),
    "a type of objects with a wrong flag": (
        set_state(Command(np.dtype, "V8", False, True), (3, "|", None, None, None, -1, -1, 0)), "numbers of type 'V8'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "name"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_other_names_are_refused(tmp_path, monkeypatch, content, name, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ids.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(DataError, match=f"asks for {name}"):
        read_token_ids(path)
    assert not (tmp_path / "TOUCHED").exists()


ATTACKS = {
    "an array of objects out of bytes": Command(np.ndarray, (2,), "O", b"A" * 16),
    "an array of uninitialized memory": Command(np.ndarray, (1000,), "u2"),
    "an object by its address": Command(
        SCALAR, set_state(Command(np.dtype, "O", False, True), (3, "|", None, None, None, -1, -1, 0)), b"A" * 8
    ),
    "an array larger than its bytes": Command(FROMBUFFER, b"12", np.dtype("u1"), (1 << 40,), "C"),
    "a negative shape": Command(FROMBUFFER, b"12", np.dtype("u1"), (-1, -2), "C"),
    "a memo of 2 to the 28 objects": b"\x80\x04]r\x00\x00\x00\x10K\x01a.",
    "a change of a function of the reader": b"\x80\x04c_codecs\nencode\nN}\x8c\x0c__defaults__)s\x86b.",
    "an array from an integer instead of bytes": Command(FROMBUFFER, 1 << 30, np.dtype("u1"), (1 << 30,), "C"),
    "a list that contains itself": b"\x80\x04]\x94h\x00a.",
    "a billion laughs": billion_laughs(),
    "deep in dicts": b"\x80\x04" + b"}K\x01" * 2000 + b"K\x01" + b"s" * 2000 + b".",
    "a sparse tensor": torch.ones(3, dtype=torch.int64).to_sparse(),
    "numbers with fractions": torch.ones(3, dtype=torch.bfloat16),
}


READ_ALL = """
import pathlib, sys
from hf_myllm.data.pickled import read_token_ids
from hf_myllm.errors import DataError
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        print(path.name, len(read_token_ids(path)), flush=True)
    except DataError as error:
        print(path.name, "DataError", error, flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcome of reading each attack, in one process of its own: some of these have caused a segmentation fault."""
    folder = tmp_path_factory.mktemp("attacks")
    for index, attack in enumerate(ATTACKS.values()):
        (folder / f"{index:02}.pkl").write_bytes(attack if isinstance(attack, bytes) else pickle.dumps(attack))
    command = [sys.executable, "-W", "ignore", "-c", READ_ALL, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result
    return result.stdout.splitlines()


@pytest.mark.parametrize(("index", "name"), list(enumerate(ATTACKS)), ids=ATTACKS)
def test_attacks_with_allowed_names_raise_an_error(outcomes, index, name):
    assert outcomes[index].startswith(f"{index:02}.pkl DataError"), name


def test_a_tensor_is_not_rebuilt_beyond_its_storage(tmp_path):
    path = tmp_path / "ids.pkl"
    rebuild, (storage, *_), *_ = torch.arange(4).__reduce_ex__(2)
    for offset, size, stride in ((0, (100,), (1,)), (2, (4,), (1,)), (0, (1 << 40,), (0,)), (0, (4,), (1 << 40,))):
        path.write_bytes(pickle.dumps(Command(rebuild, storage, offset, size, stride, False, OrderedDict())))
        with pytest.raises(DataError, match=r"more numbers|cannot be read"):
            read_token_ids(path)


def test_several_pickles_in_one_file_and_the_old_format_of_torch_save(tmp_path):
    path = tmp_path / "ids.pkl"
    path.write_bytes(pickle.dumps(IDS[:2]) + pickle.dumps(np.array(IDS[2:])))
    assert read_token_ids(path).tolist() == IDS
    torch.save(torch.tensor(IDS), path, _use_new_zipfile_serialization=False)
    assert read_token_ids(path).tolist() == IDS


def test_a_pickle_inside_a_tensor_is_refused(tmp_path):
    inner = io.BytesIO()
    torch.save({"x": Command(os.system, f"touch {tmp_path / 'touched'}")}, inner)
    path = tmp_path / "ids.pkl"
    path.write_bytes(pickle.dumps(Command(torch.storage._load_from_bytes, inner.getvalue())))
    with pytest.raises(DataError, match=r"cannot be read|asks for"):
        read_token_ids(path)
    torch.save(Command(os.system, f"touch {tmp_path / 'touched'}"), path)
    with pytest.raises(DataError, match=r"cannot be read|asks for"):
        read_token_ids(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, -5], "-5 at position 2"),
        ([[1, 2], [3, 1 << 33]], "8589934592 at position 3"),
        ([1, 1 << 70], "too large"),
        ([1.0, 2.0], "float"),
        (np.array([1.5]), "float64 numbers"),
        (np.array([True]), "bool numbers"),
        (torch.tensor([0.5]), "whole numbers"),
        ([True, False], "bool"),
        (["a"], "str"),
        ({"ids": IDS}, "dict"),
        ([], "no token ids"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_content_that_is_not_token_ids(tmp_path, content, message):
    path = tmp_path / "ids.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        read_token_ids(path)


@pytest.mark.parametrize(
    "data", [b"", b"not a pickle", pickle.dumps(IDS)[:-3], b"\x80\x05]" + b"]" * 50, b"PK\x03\x04"]
)
def test_damaged_pickles(tmp_path, data):
    path = tmp_path / "ids.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match="ids.pkl"):
        read_token_ids(path)
