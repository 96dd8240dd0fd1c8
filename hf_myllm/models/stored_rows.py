"""A stored model of which each rank of FSDP2 reads only its rows."""

from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import ModelError
from .export import weight_files
from .initialization import InitialWeights, make_on_meta, set_buffer


class Unsupported(Exception):
    """Why a model has to be loaded whole."""


class StoredRows:
    """Returns rows of a model's parameters: of those that are stored from their file, of the others initial values.

    Args:
        stored: name of a parameter -> (file, name in the file).
        initial: the [`InitialWeights`] of the model.
    """

    def __init__(self, stored, initial):
        self._stored, self._initial, self._files, self._added = stored, initial, {}, {}

    def __call__(self, name, start=0, stop=None):
        if name not in self._stored:
            return self._initial.rows(name, start, stop)
        if name not in self._added:
            return self._read(name, start, stop)
        first, added = self._added[name]
        stop = first + len(added) if stop is None else stop
        old = self._read(name, min(start, first), min(stop, first))
        return torch.cat([old, added[max(0, start - first) : max(0, stop - first)].to(old.dtype)])

    def _read(self, name, start, stop):
        file, stored_name = self._stored[name]
        if file not in self._files:
            self._files[file] = safe_open(file, framework="pt")
        tensor = self._files[file].get_slice(stored_name)
        rows = tensor[start:stop] if tensor.get_shape() else self._files[file].get_tensor(stored_name)
        if not rows.isfinite().all():
            raise ModelError(f"{file}: {stored_name} holds NaN or infinity; give a model without them")
        return rows.to(self._initial.dtype)

    def forget(self, names):
        """Give these parameters initial values."""
        for name in names:
            self._stored.pop(name, None)

    def add(self, rows, config):
        """Add rows to parameters; `config` is that of the model with them."""
        initial, old = self._initial, self._initial.shapes
        self._added = {name: (old[name][0], values) for name, values in rows.items()}
        self._initial = InitialWeights(make_on_meta(type(initial.model), config), initial.seed, initial.dtype)


def open_model(model_class, path, config, dtype, seed):
    """Return a model on the meta device with `read_rows`, a [`StoredRows`], and the loading info of `from_pretrained`.

    Raises:
        Unsupported: its weights are stored in another form than the model has them in.
    """
    folder = (
        Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), allow_patterns=["*.json", "model*"]))
    )
    model = make_on_meta(model_class, config)
    initial, shapes, files, renamed = InitialWeights(model, seed, dtype), {}, {}, _renaming(model)
    if not (stored_files := weight_files(folder)):
        raise Unsupported("it has no safetensors files")
    for file in stored_files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                shapes[renamed(name)], files[renamed(name)] = tuple(tensors.get_slice(name).get_shape()), (file, name)
    state = model.state_dict(keep_vars=True)
    info = SimpleNamespace(missing_keys=set(state) - set(shapes), unexpected_keys=set(shapes) - set(state))
    mismatched = {(name, shapes[name], tuple(state[name].shape)) for name in set(state) & set(shapes)}
    mismatched = {entry for entry in mismatched if entry[1] != entry[2]}
    stored = _untie(
        model, {name: files[name] for name in set(state) & set(shapes) - {name for name, *_ in mismatched}}, info
    )
    model._adjust_missing_and_unexpected_keys(info)
    model.name_or_path = str(path)  # an adapter names its base model so
    model.read_rows = StoredRows(stored, initial)
    for name, buffer in model.named_buffers():
        if name in stored:
            set_buffer(model, name, model.read_rows(name).to(buffer.dtype))
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), {**vars(info), "mismatched_keys": mismatched}


def _renaming(model):
    """Return a function that returns the name in the model of a stored name, as the library has it."""
    mapping, expected = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(name):
        new_name, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if converter is not None:
            raise Unsupported(f"the library converts {name} while it loads it")
        return new_name

    return rename


def _untie(model, stored, info):
    """Return what is stored by the name that `named_parameters` gives a weight that has several."""
    named, first = list(model.named_parameters(remove_duplicate=False)), {}
    for name, parameter in named:
        first.setdefault(parameter, name)
    for name, parameter in named:
        main = first[parameter]
        others = [other for other, tied in named if tied is parameter and other in stored] if main != name else ()
        if len(others) > 1:
            raise Unsupported(f"it stores {others[0]} a second time, as {others[1]}")
        if others:
            stored[main] = stored.pop(others[0])
            info.missing_keys -= {name, main}
    return stored
