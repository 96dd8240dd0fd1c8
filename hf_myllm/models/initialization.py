"""The initial values of a model, each parameter drawn by its name: the same for any number of ranks.

The model is made on the meta device, where its class's `_init_weights` runs and what it does to each parameter is
recorded. Any rows of a parameter can then be drawn alone, in blocks that have a seed each, so that a rank of FSDP2
needs no more memory than its share.
"""

import math
from contextlib import contextmanager, suppress
from functools import partial

import torch
import transformers.initialization as library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..seeds import derive_seed

_BLOCK = 1 << 20  # numbers that are drawn from one seed
_RANDOM = ("normal_", "uniform_", "trunc_normal_")
_OVERWRITING = (*_RANDOM, "zero_", "fill_", "copy_")
_RECORDED = (*_OVERWRITING, "mul_", "add_", "div_", "sub_")  # element by element: rows do not depend on others


class InitialWeights:
    """What a new model of a class has in each parameter.

    Attributes:
        model: the model, with its parameters on the meta device. Its buffers, which are small, have their values.
        made_whole: names of the parameters that only the class's constructor sets; the whole model was made for them.
    """

    def __init__(self, model, seed, dtype=torch.float32):
        """Record the initialization of a model, which [`make_on_meta`] returned, and tie its weights.

        Args:
            seed: the values are a pure function of it, the names and the shapes.
            dtype: of the values that [`rows`] returns; they are drawn in float32.
        """
        self.model, self.seed, self.dtype, self._whole = model, seed, dtype, {}
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = _marked(buffer)
        recorder = _Recorder(model)
        with recorder.installed():
            self._initialize()
        self._programs = recorder.programs
        unknown = [name for name in self._programs if name in recorder.unsupported or not self._is_covered(name)]
        if unknown:
            self._draw_whole(unknown)
        model.tie_weights()
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._source = {name: model.all_tied_weights_keys.get(name, name) for name in self.shapes}
        self.made_whole = [name for name in self.shapes if self._source[name] in set(unknown) - self._whole.keys()]
        buffers = [name for name, buffer in model.named_buffers() if _has_mark(buffer)]
        if self.made_whole or buffers:
            torch.manual_seed(seed)
            whole = type(model)(model.config)
            self._whole |= {self._source[name]: whole.get_parameter(name).detach() for name in self.made_whole}
            for name in buffers:
                set_buffer(model, name, whole.get_buffer(name))
        # Cast the buffers that are saved, as loading does. Others, such as rotary frequencies, stay in fp32.
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.data = tensor.data if tensor.is_meta else tensor.data.to(dtype)

    def update(self, other):
        """Give the parameters that another class has under the same names the values that it gives them."""
        for name in self.shapes.keys() & other.shapes.keys():
            self._source[name] = name
            self._programs[name] = other._programs[other._source[name]]
            self._whole.pop(name, None)
            if other._source[name] in other._whole:
                self._whole[name] = other._whole[other._source[name]]

    def _initialize(self):
        """Call the model's `_init_weights` for each module, as the library does, under a seed of the module's name."""
        with torch.no_grad(), torch.random.fork_rng([]), library.guard_torch_init_functions():
            for name, module, owner in _modules(self.model, self.model, "", set()):
                torch.default_generator.manual_seed(derive_seed(self.seed, name))
                owner._init_weights(module)
                module._is_hf_initialized = True

    def _draw_whole(self, names):
        """Initialize parameters that cannot be drawn by rows, such as the decay rates of a state space model."""
        model, before = self.model, {name: self.model.get_parameter(name) for name in names}
        materialize(model, {name: _marked(parameter) for name, parameter in before.items()})
        with suppress(NotImplementedError, RuntimeError):  # one is computed from another, which is not there
            self._initialize()
        drawn = {name: model.get_parameter(name).detach() for name in names}
        self._whole = {name: values for name, values in drawn.items() if not _has_mark(values)}
        materialize(model, {name: parameter.detach().to("meta") for name, parameter in before.items()})

    def _is_covered(self, name):
        """Return whether every row is overwritten before anything is computed from it."""
        covered = torch.zeros(_num_rows(self.model.get_parameter(name).shape), dtype=torch.bool)
        for operation, start, stop, _ in self._programs[name]:
            if operation not in _OVERWRITING and not covered[start:stop].all():
                return False
            covered[start:stop] = True
        return bool(covered.all())

    def rows(self, name, start=0, stop=None):
        """Return rows [start, stop) of a parameter."""
        shape, num_rows, name = self.shapes[name], _num_rows(self.shapes[name]), self._source[name]
        if name in self._whole:
            return (self._whole[name][start:stop] if shape else self._whole[name]).to(self.dtype)
        stop = num_rows if stop is None else stop
        rows = torch.empty(stop - start, *shape[1:], dtype=self.dtype)
        per_block = max(1, _BLOCK // max(1, math.prod(shape[1:])))
        for block in range(start // per_block, math.ceil(stop / per_block)):
            first, last = block * per_block, min(num_rows, (block + 1) * per_block)
            low, high = max(first, start), min(last, stop)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, name, block))
            if (low, high) == (first, last) and self.dtype == torch.float32:
                self._draw(name, rows[low - start : high - start], first, generator)  # without a copy
                continue
            values = torch.empty(last - first, *shape[1:])
            self._draw(name, values, first, generator)
            rows[low - start : high - start] = values[low - first : high - first]
        return rows.view(shape) if not shape else rows

    def materialize(self):
        """Return the model with all its parameters."""
        materialize(self.model, {name: self.rows(name) for name, _ in self.model.named_parameters()})
        return self.model

    @torch.no_grad()
    def _draw(self, name, values, first, generator):
        """Do to a block of rows, which begins at row `first`, what was recorded of the parameter."""
        for operation, start, stop, arguments in self._programs[name]:
            low, high = max(start, first), min(stop, first + len(values))
            if low >= high:
                continue
            part = values[low - first : high - first]
            if operation == "copy_":
                part.copy_(arguments[0][low - start : high - start])
            elif operation == "trunc_normal_":
                torch.nn.init.trunc_normal_(part, *arguments, generator=generator)
            elif operation in _RANDOM:
                getattr(part, operation)(*arguments, generator=generator)
            else:
                getattr(part, operation)(*arguments)


class _Recorder(TorchDispatchMode):
    """Records the operations that change parameters on the meta device, as {name: [(operation, rows, arguments)]}."""

    def __init__(self, model):
        super().__init__()
        self._parameters = {p.untyped_storage()._cdata: (name, p) for name, p in model.named_parameters()}
        self.programs = {name: [] for name, _ in self._parameters.values()}
        self.unsupported = set()

    @contextmanager
    def installed(self):
        originals = dict(library.TORCH_INIT_FUNCTIONS)

        def record_truncated(tensor, mean=0.0, std=1.0, a=-2.0, b=2.0, generator=None):
            self._record("trunc_normal_", tensor, (mean, std, a, b))
            return tensor

        def refuse(tensor, *arguments, **options):
            self.unsupported.add(self._name(tensor))
            return tensor

        # torch skips these for meta tensors.
        substitutes = {"trunc_normal_": record_truncated} | dict.fromkeys(("orthogonal_", "dirac_", "sparse_"), refuse)
        for name, substitute in substitutes.items():
            library.TORCH_INIT_FUNCTIONS[name] = _choose(substitute, originals[name])
        try:
            with self:
                yield
        finally:
            library.TORCH_INIT_FUNCTIONS.update(originals)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            target, *others = args or (None,)
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
            operation = func.overloadpacket.__name__
            # Only copy_ can read rows of another tensor; a keyword argument, such as alpha, would be lost.
            is_simple = operation == "copy_" or not any(
                isinstance(leaf, torch.Tensor) and leaf.dim() for leaf in others
            )
            is_simple = is_simple and not (kwargs or {}).keys() - {"generator"}
            if len(tensors) == 1 and tensors[0] is target and operation in _RECORDED and is_simple:
                self._record(operation, target, others)
            else:
                self.unsupported |= {self._name(tensor) for tensor in tensors}
        return result

    def _name(self, tensor):
        return self._parameters.get(tensor.untyped_storage()._cdata, (None,))[0]

    def _record(self, operation, tensor, arguments):
        name, parameter = self._parameters.get(tensor.untyped_storage()._cdata, (None, None))
        if name is None:
            return
        size = math.prod(parameter.shape[1:])
        if not tensor.is_contiguous() or not size or tensor.storage_offset() % size or tensor.numel() % size:
            self.unsupported.add(name)
            return
        start = tensor.storage_offset() // size
        stop = start + tensor.numel() // size
        if operation == "copy_":
            arguments = [arguments[0].detach().expand(tensor.shape).reshape(stop - start, *parameter.shape[1:]).clone()]
        if operation in _OVERWRITING and (start, stop) == (0, _num_rows(parameter.shape)):
            self.programs[name].clear()
        self.programs[name].append((operation, start, stop, arguments))


def _choose(on_meta, elsewhere):
    return lambda tensor, *args, **options: (on_meta if tensor.is_meta else elsewhere)(tensor, *args, **options)


def _num_rows(shape):
    return shape[0] if shape else 1


def _modules(module, owner, prefix, seen):
    """Yield (name, module, the model whose `_init_weights` initializes it) in the order of the library."""
    if module in seen:
        return
    seen.add(module)
    for name, child in module.named_children():
        yield from _modules(child, child if isinstance(child, PreTrainedModel) else owner, f"{prefix}{name}.", seen)
    yield prefix[:-1], module, owner


def _marked(tensor):
    """Return a tensor of the same shape on the CPU whose values no initialization gives."""
    kind = tensor.dtype
    mark = math.nan if kind.is_floating_point else 1 if kind is torch.bool else torch.iinfo(kind).min
    return torch.full_like(tensor, mark, device="cpu", requires_grad=False)


def _has_mark(tensor):
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    return tensor.dtype is not torch.bool and bool((tensor == torch.iinfo(tensor.dtype).min).any())


def materialize(model, values):
    """Replace parameters of a model, and those that are tied to them, by new ones with these values by name."""
    new = {model.get_parameter(name): torch.nn.Parameter(value) for name, value in values.items()}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter in new:
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, new[parameter].requires_grad_(parameter.requires_grad))


def set_buffer(model, name, value):
    """Replace a buffer of a model."""
    module, _, last = name.rpartition(".")
    model.get_submodule(module)._buffers[last] = value


def make_on_meta(model_class, config):
    """Return a model without memory for its parameters and buffers. None of its weights is tied to another yet."""
    with torch.device("meta"), library.no_tie_weights():
        return model_class(config)


def grow_vocabulary(model, vocab_size, seed):
    """Add rows to a model's embeddings and to its head: close to the mean of the old ones (Hewitt 2021), so that no
    token starts out likely.

    They are drawn by the parameter's name from the normal distribution with the mean of the old rows and 1e-9 of their
    covariance, as the library has it; here from blocks of the old rows, so that none is loaded whole. The sums are in
    float64: the rows do not depend on the number of threads.
    """
    shapes, read_rows = (
        {name: parameter.shape for name, parameter in model.named_parameters()},
        vars(model).get("read_rows"),
    )
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    added = {}
    for name, parameter in model.named_parameters():
        if parameter.shape != shapes[name]:
            read = (
                partial(read_rows, name) if read_rows else lambda start, stop, values=parameter.data: values[start:stop]
            )
            added[name] = _draw_alike(read, shapes[name], len(parameter) - shapes[name][0], seed, name)
            if not read_rows:
                parameter.data[shapes[name][0] :] = added[name]
    if read_rows:
        read_rows.add(added, model.config)


def _draw_alike(read, shape, count, seed, name):
    """Return `count` new rows for a parameter of this shape; see [`grow_vocabulary`]."""
    num_rows, per_block = shape[0], max(1, _BLOCK // math.prod(shape[1:]))
    blocks = [(start, min(num_rows, start + per_block)) for start in range(0, num_rows, per_block)]
    mean = sum(read(*block).double().sum(0) for block in blocks) / num_rows
    rows = mean.expand(count, *shape[1:]).clone()
    for start, stop in blocks:
        generator = torch.Generator().manual_seed(derive_seed(seed, "vocabulary", name, start))
        factors = torch.randn(count, stop - start, dtype=torch.float64, generator=generator)
        rows += math.sqrt(1e-9 / num_rows) * torch.tensordot(factors, read(start, stop).double() - mean, 1)
    return rows


def reinitialize(model, names, seed):
    """Give some parameters of a model, such as those of a new head, the values that a new model has."""
    if "read_rows" in vars(model):
        return model.read_rows.forget(names)
    weights = InitialWeights(make_on_meta(type(model), model.config), seed) if names else None
    with torch.no_grad():
        for name in names:
            if name in weights.shapes:  # and not a buffer
                model.get_parameter(name).copy_(weights.rows(name))
