"""The weights of a checkpoint: no weight is lost or misread without a word."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from ..errors import ModelError, first_line
from ..files import find_lfs_pointer
from ..terminal import first_of, warn
from . import stored_rows
from .revisions import find_id

# Buffers in files of earlier versions of the stock classes: nothing in them was learned.
_BUFFERS = re.compile(r"attn\.(masked_)?bias$|position_ids$|\.inv_freq$")
_WRAPPERS = {r"^(?:(?:module|_orig_mod)\.)+": "", r"\._orig_mod\.": "."}  # names that DDP and torch.compile add


def load(model_class, path, config, dtype, seed=None):
    """Return the model of a folder or the Hub and the library's loading info.

    Args:
        seed: of what is not stored, to leave the parameters on the meta device, if that is possible; see
            [`stored_rows`].
    Raises:
        ModelError: it cannot be loaded, holds weights that the model has no place for, or weights that are no numbers,
            or its head is not tied to the embeddings as its configuration says.
    """
    if seed is not None:
        try:
            model, loading_info = stored_rows.open_model(model_class, path, config, dtype, seed)
            if not _has_wrappers(loading_info):
                return _checked(model, path, loading_info)
            reason = "its weights have the names of wrapped modules"
        except (stored_rows.Unsupported, SafetensorError, OSError, ValueError) as error:
            reason = first_line(error)
        warn(f"{path}: each rank reads the whole model, because {reason}")
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
    options |= {"output_loading_info": True, "trust_remote_code": False}
    try:
        model, loading_info = model_class.from_pretrained(str(path), **options)
        if _has_wrappers(loading_info):
            model, loading_info = model_class.from_pretrained(str(path), key_mapping=_WRAPPERS, **options)
            model._weight_conversions = None  # saving would apply the renaming backwards
    except Exception as error:
        reason = first_line(error)[:300]
        if "Meta tensors" in reason:  # the library compares the weight of another size with that of the embeddings
            reason = "its head has another size than the embeddings that its config.json ties it to"
        raise ModelError(find_lfs_pointer(path) or f"the model {path} cannot be loaded: {reason}") from None
    return _checked(model, path, loading_info)


def _has_wrappers(loading_info):
    return any(re.search(pattern, name) for name in loading_info["unexpected_keys"] for pattern in _WRAPPERS)


def _checked(model, path, loading_info):
    repo, commit = find_id(path)
    if repo:  # an adapter names its base model so
        model.name_or_path, model.hub_commit, model.config._commit_hash = repo, commit, commit
    _check_tied(model, path, loading_info["missing_keys"])
    loading_info["unused"] = _find_unused(model, path, loading_info["unexpected_keys"])
    _check_numbers(model, path)
    return model, loading_info


def _check_tied(model, path, missing):
    """Refuse a head that the configuration ties to the embeddings and the file does not, or the other way round.

    The library trains the first as two weights; other tools, which go by the configuration, would lose one of them.
    """
    problem = None
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source):
            problem = f"its config.json ties {target} to {source}, which differs in its file", "false"
    heads = "LMHead|ForCausalLM|MaskedLM|PreTraining|ConditionalGeneration"
    had_head = any(re.search(heads, name) for name in model.config.architectures or ())
    ties = model._tied_weights_keys if had_head and not model.config.tie_word_embeddings else {}
    if heads := [name for name in ties or () if name in missing]:
        problem = f"its config.json does not tie {heads[0]} to the embeddings, and its file has no such weight", "true"
    # The stock configurations of T5 1.1 and its relatives call each head tied; there the file decides.
    is_free = not getattr(model.config, "scale_decoder_outputs", False)
    if problem and not (is_free and type(model.config)(tie_word_embeddings=False).tie_word_embeddings):
        raise ModelError(f"the model {path}: {problem[0]}; set tie_word_embeddings to {problem[1]} in its config.json")


def _find_unused(model, path, names):
    """Return the names of the weights of other heads, which are not used; refuse any other weight that would be lost.

    Args:
        names: of the weights that the model has no place for.
    """
    names = sorted(name for name in names if not _BUFFERS.search(name))
    body, modules = getattr(model, model.base_model_prefix, model), dict(model.named_modules())
    parts = {model.base_model_prefix, *(name for name, _ in body.named_children())}
    lost = [name for name in names if name.split(".")[0] in parts or name.rpartition(".")[0] in modules]
    if lost := [name for name in lost if ".pooler." not in f".{name}"]:  # a head of BERT, in the part without a head
        raise ModelError(
            f"the model {path} has weights that its config.json leaves no place for: {first_of(lost)}; correct the "
            "config (a number of layers, a bias), or the weights"
        )
    return names


def warn_unused(path, names):
    """Print which weights of a checkpoint are not used; nothing if there are none."""
    if names:
        warn(f"{path}: weights of another head are not used: {first_of(names)}")


def _check_numbers(model, path):
    """Refuse weights that were rounded to integers, which load as if they were numbers, NaN and infinity."""
    folder = Path(path) if Path(path).is_dir() else Path(cached_file(str(path), "config.json")).parent
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                dtype = tensors.get_slice(name).get_dtype()
                if dtype not in ("F16", "BF16", "F32", "F64") and not _BUFFERS.search(name):
                    raise ModelError(f"{file}: {name} holds {dtype} numbers; give a model that is not quantized")
    for name, parameter in model.named_parameters():
        if not (parameter.is_meta or parameter.isfinite().all()):  # StoredRows checks what it reads
            raise ModelError(f"the model {path}: {name} holds NaN or infinity; give a model without them")
