"""Train and fine-tune GPT, Llama, Qwen3 and BERT; the results are stock Hugging Face models."""

import importlib
import os
import sys
import types

__version__ = "0.1.0"

_EXPORTS = {  # public name -> (module, name there); imported on first use, so that `import hf_myllm` stays fast
    "Recipe": ("recipe", "Recipe"),
    "RunResult": ("train", "RunResult"),
    "train": ("train", "train"),
    "evaluate": ("train", "evaluate"),
    "generate": ("generate", "generate"),
    "load": ("generate", "load"),
    "InputError": ("errors", "InputError"),
    "RecipeError": ("errors", "RecipeError"),
    "DataError": ("errors", "DataError"),
    "ModelError": ("errors", "ModelError"),
    "CheckpointError": ("errors", "CheckpointError"),
    "HubError": ("errors", "HubError"),
}
__all__ = list(_EXPORTS)


class _Package(types.ModuleType):
    def __getattr__(self, name):
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _EXPORTS[name]
        value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        setattr(self, name, value)
        return value

    def __setattr__(self, name, value):
        # Importing the submodule hf_myllm.train sets it as an attribute, which would hide the function hf_myllm.train.
        if name not in _EXPORTS or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)

    def __dir__(self):
        return [*super().__dir__(), *_EXPORTS]


sys.modules[__name__].__class__ = _Package


def _sleep_on_a_busy_machine(loadavg="/proc/loadavg"):
    """Let OpenMP's threads sleep while they wait for each other, if other processes want all cores already.

    By default they spin, which is faster only while each has a core. torch reads the policy when it is imported, so
    this must come first. docs/speed.md has the measurements.
    """
    is_set = any(name.startswith(("OMP_WAIT_POLICY", "GOMP_")) for name in os.environ)
    if not is_set and "torch" not in sys.modules and os.path.exists(loadavg):  # on Linux
        with open(loadavg) as file:
            runnable = int(file.read().split()[3].partition("/")[0])  # threads that run or wait for a core, with this
        if runnable > os.cpu_count():
            os.environ["OMP_WAIT_POLICY"] = "passive"


_sleep_on_a_busy_machine()
