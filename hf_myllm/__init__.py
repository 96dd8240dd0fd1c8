"""Train and fine-tune GPT, Llama, Qwen3, BERT, T5 and BART; the results are stock Hugging Face models."""

import importlib
import os
import sys
import time
import types

__version__ = "0.1.0"

_EXPORTS = {  # public name -> its module, imported on first use, so that `import hf_myllm` stays fast
    "Recipe": "recipe",
    **dict.fromkeys(("RunResult", "train", "evaluate"), "train"),
    "average": "average",
    **dict.fromkeys(("generate", "load"), "generate"),
    **dict.fromkeys(("InputError", "RecipeError", "DataError", "ModelError", "CheckpointError", "HubError"), "errors"),
}
__all__ = list(_EXPORTS)


class _Package(types.ModuleType):
    def __getattr__(self, name):
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name, value):
        # Importing the submodule hf_myllm.train sets it as an attribute, which would hide the function hf_myllm.train.
        if name not in _EXPORTS or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)

    def __dir__(self):
        return [*super().__dir__(), *_EXPORTS]


sys.modules[__name__].__class__ = _Package


def _sleep_on_a_busy_machine(stat="/proc/stat"):
    """Let OpenMP's threads sleep while they wait for each other, if other processes use the cores already.

    By default they spin, which is faster only while each has a core: one busy process of another session can make
    training 13 times slower. torch reads the policy when it is imported, so this must come first. docs/speed.md has the
    measurements.
    """
    is_set = any(name.startswith(("OMP_WAIT_POLICY", "GOMP_")) for name in os.environ)
    is_one_of_several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1  # the others are ranks that start as well
    if is_set or is_one_of_several or "torch" in sys.modules or not os.path.exists(stat):  # it exists on Linux
        return
    try:
        before = _idle_time(stat)
        time.sleep(0.1)
        idle, total = (now - then for now, then in zip(_idle_time(stat), before, strict=True))
    except (OSError, ValueError, IndexError):  # some sandboxes forbid or shorten it
        return
    if total - idle > 0.5 * total / os.cpu_count():  # more than half a core
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _idle_time(stat):
    """Return the time that all cores together were idle, and the time that they had."""
    with open(stat) as file:
        times = [int(field) for field in file.readline().split()[1:9]]
    return times[3] + times[4], sum(times)


_sleep_on_a_busy_machine()
