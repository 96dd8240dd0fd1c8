"""Configurations and weights: of a new model, of a checkpoint, of an adapter with its base model.

Training, prediction, generation and the Hub's stock check load their models here. For training, a checkpoint may lack
the weights of a head, which are then newly initialized, and its vocabulary may be extended.
"""

import os
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)

from ..errors import ModelError, first_line
from ..terminal import first_of, plural, warn
from . import FAMILIES, auto, lora, weights
from .initialization import InitialWeights, grow_vocabulary, make_on_meta, reinitialize
from .stock import check_sizes

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in a configuration as in its tokenizer
# What a recipe may change of a checkpoint's configuration, besides dropout. The last two extend its context.
_FREE_SETTINGS = {*SPECIAL_TOKENS, "use_cache", "initializer_range", "max_position_embeddings", "rope_parameters"}
_CONFIG_ERRORS = (StrictDataclassError, ValueError, TypeError, AttributeError, OSError, ArithmeticError, KeyError)


def read_model_type(pretrained):
    """Return the `model_type` of a model or an adapter, a folder or Hub id; None if its configuration has none.

    Raises:
        ModelError: there is no model, or it is quantized.
    """
    try:
        config = PreTrainedConfig.get_config_dict(lora.config_of(pretrained))[0]
        quantization = config.get("quantization_config")
    except Exception as error:  # the library raises many classes of errors here
        if (Path(pretrained) / "config.json").exists():
            raise ModelError(f"{pretrained}/config.json is not a model's configuration: {first_line(error)}") from None
        raise ModelError(
            f"the model {pretrained} cannot be found: it is no folder with a config.json, and not available on the "
            f"Hugging Face Hub ({first_line(error)[:200]})"
        ) from None
    if quantization:
        raise ModelError(f"the model {pretrained} is quantized ({quantization!r:.80}); give one that is not")
    return config.get("model_type")


def read_config(family, pretrained):
    """Return the configuration of a model or an adapter.

    Args:
        family: a key of FAMILIES.
        pretrained: folder or Hub id.
    Raises:
        ModelError: there is no model, its configuration is invalid, or it belongs to another family.
    """
    config_class, model_type = FAMILIES[family].config, read_model_type(pretrained)
    if model_type not in (None, config_class.model_type):
        raise ModelError(
            f"{pretrained} is a {model_type} model, and the recipe's model is {family}; give --model "
            f"{FAMILIES.name_of(model_type)}, or leave it out"
        )
    try:
        return config_class.from_pretrained(lora.config_of(pretrained))
    except _CONFIG_ERRORS as error:
        raise ModelError(f"config of {pretrained}: {first_line(error.__cause__ or error)}") from None


def build_config(
    family,
    settings,
    pretrained=None,
    tokenizer=None,
    task_settings=None,
    max_len=None,
    use_tokenizer_ids=False,
    add_tokens=False,
):
    """Return the configuration of a checkpoint or, without one, the default of the family, with changed settings.

    Args:
        family: a key of FAMILIES.
        settings: the recipe's `config`.
        pretrained: folder or Hub id of the checkpoint.
        tokenizer: sets the special tokens and the vocabulary size of a new model.
        task_settings: settings of the task, for example its labels; they replace the recipe's.
        max_len: number of positions of a new model, so that each is trained.
        use_tokenizer_ids: set the special tokens of a checkpoint from the tokenizer too, because it replaces its own.
        add_tokens: extend the vocabulary of a checkpoint to that of the tokenizer.
    Raises:
        ModelError: a value is invalid, or the vocabulary is smaller than the tokenizer's.
    """
    family_name, family = family, FAMILIES[family]
    config_class, recipe_settings, settings = family.config, settings, dict(settings)
    try:
        check_sizes(config_class, settings)
        if tokenizer is not None and (not pretrained or use_tokenizer_ids):
            for name in SPECIAL_TOKENS:
                settings.setdefault(name, getattr(tokenizer, name))
            if not pretrained:
                settings = _decoder_tokens(config_class, settings) | settings
        settings |= task_settings or {}
        if pretrained:
            config = config_class.from_pretrained(lora.config_of(pretrained), **settings)
            if add_tokens and "vocab_size" not in settings:
                config.vocab_size = max(config.vocab_size, num_token_ids(tokenizer))
        else:
            if tokenizer is not None:
                settings.setdefault("vocab_size", num_token_ids(tokenizer))
            positions = config_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")
            if max_len and positions in config_class.__dataclass_fields__:
                offset = auto.position_offset(config_class, settings.get("pad_token_id"))
                settings.setdefault(positions, max_len + offset)
            config = config_class(**settings)
        vars(config).pop("auto_map", None)  # names code of somebody else, which is not run
        family.check_architecture(config)
    except _CONFIG_ERRORS as error:
        raise ModelError(f"config of {pretrained or family_name}: {first_line(error.__cause__ or error)}") from None
    _check_special_tokens(config, recipe_settings, tokenizer)
    size = 0 if tokenizer is None else num_token_ids(tokenizer)
    if size > config.vocab_size:
        raise ModelError(
            f"the model's vocab_size {config.vocab_size} is smaller than the tokenizer's {size} token ids; raise it "
            f"(--vocab_size {size}), or give the model's own tokenizer"
        )
    return config


def _decoder_tokens(config_class, settings):
    """Return the special tokens of a new encoder-decoder's decoder, which follow from those of its text.

    A decoder starts with the end or the beginning of text, if it does so in the default configuration of the class
    (BART), else with the padding token (T5).
    """
    default, tokens = config_class(), {}
    if not default.is_encoder_decoder:
        return {}
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(default, name, None)
        same = [other for other in SPECIAL_TOKENS if value is not None and getattr(default, other, None) == value]
        if same or name == "decoder_start_token_id":
            tokens[name] = settings[same[0] if same else "pad_token_id"]
    return tokens


def num_token_ids(tokenizer):
    """Return how many embeddings a tokenizer needs: its highest id + 1, which may be more than its length."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def _check_special_tokens(config, recipe_settings, tokenizer):
    """Replace special tokens of a checkpoint's configuration that are beyond its vocabulary, such as -1, by those of
    the tokenizer: an embedding would fail on them. Refuse those of a recipe."""
    for name in SPECIAL_TOKENS:
        ids = getattr(config, name, None)
        outside = [
            i for i in (ids if isinstance(ids, list) else [ids]) if i is not None and not 0 <= i < config.vocab_size
        ]
        if outside and name in recipe_settings:
            raise ModelError(f"{name} is {outside[0]}; it must be in the vocabulary, below {config.vocab_size}")
        if outside:
            own = getattr(tokenizer, name, None)
            setattr(config, name, own if own is not None and own < config.vocab_size else None)


def check_settings(settings, stored_config, pretrained, is_trained):
    """Check that a recipe's `config` keeps the architecture that the weights of a checkpoint were trained with.

    Args:
        is_trained: whether the checkpoint is resumed or evaluated; otherwise its vocabulary may be extended.
    Raises:
        ModelError: a value differs.
    """
    for name, value in settings.items():
        stored = getattr(stored_config, name)
        if name == "vocab_size" and value > stored and not is_trained:
            continue
        if stored != value and name not in _FREE_SETTINGS and "drop" not in name:
            raise ModelError(
                f"config of {pretrained}: {name} is {stored!r}; the recipe's {value!r} is another model's; drop it"
            )


def build_model(
    family,
    task,
    config,
    pretrained=None,
    is_trained=False,
    replaces_head=False,
    labels_fit=True,
    use_config_ids=False,
    seed=0,
    dtype=torch.float32,
    lora_settings=None,
    on_meta=False,
):
    """Return the model that a run trains or evaluates, and the names of its newly initialized weights.

    Args:
        family: a key of FAMILIES.
        task: a key of the family's tasks.
        config: from [`build_config`].
        pretrained: folder or Hub id of a model or an adapter to load; None: initialize all weights.
        is_trained: whether `pretrained` is resumed or evaluated. It must then have all weights, and an adapter remains
            one; otherwise an adapter is merged.
        replaces_head: whether a head of another size is newly initialized instead of an error.
        labels_fit: whether a pretrained head may be kept; if not, it is newly initialized.
        use_config_ids: set the special tokens of generation from the configuration.
        seed: seed of the newly initialized weights.
        lora_settings: arguments of [`lora.add`], to train an adapter; None: train all weights.
        on_meta: leave the parameters on the meta device. The model's `read_rows(name, start, stop)` returns their rows.
    Raises:
        ModelError: the model cannot be loaded, does not fit the configuration, or lacks weights of the task.
    """
    base = lora.base_of(pretrained)
    if lora_settings:
        _check_lora(pretrained, base, is_trained)
    if not pretrained:
        return _initialize(family, task, config, seed, dtype, on_meta), []
    try:  # what a base model lacks, its adapter has
        source, must_be_whole = base or pretrained, is_trained and not base
        if on_meta and base and not is_trained:
            warn(f"{pretrained}: each rank reads the whole model, because its adapter is merged")
        by_rows = on_meta and (is_trained or not base)
        model, new = _load(family, task, config, source, must_be_whole, replaces_head, dtype, seed, by_rows)
        reinitialize(model, new, seed)
    except ModelError as error:
        raise _explain(error, pretrained, base) from None
    if use_config_ids and model.can_generate():
        for name in SPECIAL_TOKENS:
            setattr(model.generation_config, name, getattr(config, name))
    if base:
        model, new = lora.load(model, pretrained), []
        if is_trained:
            return model, new
        model = lora.merge(model).requires_grad_(True)
        model.tie_weights()  # leaves out what no output depends on
    has_head = not any(name.startswith(head) for name in new for head in _heads(model))
    if has_head and not labels_fit and not is_trained:
        new += [f"{name}.{weight}" for name, head in _heads(model).items() for weight, _ in head.named_parameters()]
        reinitialize(model, new, seed)
    return lora.add(model, task, new, seed, **lora_settings) if lora_settings else model, new


def load_stock_model(folder, dtype="auto"):
    """Return the model of a folder as the stock class that its configuration names, with its adapter if it is one.

    Raises:
        ModelError: there is no model, or it cannot be loaded.
    """
    model_class = getattr(transformers, read_architecture(folder), AutoModelForCausalLM)
    config = AutoConfig.from_pretrained(lora.config_of(folder), trust_remote_code=False)
    return load_model(model_class, folder, config, dtype)


def read_architecture(folder):
    """Return the name of the stock class of a folder's model, "" if its configuration has none.

    Raises:
        ModelError: the configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(lora.config_of(folder), trust_remote_code=False)
        return (config.architectures or [""])[0]
    except Exception as error:
        raise ModelError(f"{folder}/config.json is not a model's configuration: {first_line(error)[:200]}") from None


def load_model(model_class, folder, config, dtype="auto"):
    """Return the model of a folder for evaluation or generation; an adapter is a peft model around its base model.

    Args:
        model_class: one of ours, a stock class or an Auto class.
    Raises:
        ModelError: it cannot be loaded.
    """
    base = lora.base_of(folder)
    try:
        model, info = weights.load(model_class, base or folder, config, dtype)
        if not base:  # the base model of an adapter may have another head, which the adapter replaces
            if info["missing_keys"]:
                raise ModelError(f"the model {folder} lacks weights: {first_of(sorted(info['missing_keys']))}")
            _check_fit(folder, sorted(info["mismatched_keys"]), "its config.json")
        weights.warn_unused(folder, info["unused"])
    except ModelError as error:
        raise _explain(error, folder, base) from None
    if not base:
        return model.eval()
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return lora.load(model, folder).eval()


def use_flex_attention(model, device_type):
    """Let a model that keeps packed documents apart use flex attention on a GPU, which skips the blocks between
    documents; sdpa would compute and mask them. Flex attention has no dropout: with attention dropout, sdpa stays."""
    names = [name for name in model.config.to_dict() if name.startswith("att") and "drop" in name]
    if device_type == "cuda" and not any(getattr(model.config, name) for name in names):
        model.set_attn_implementation("flex_attention")


def _load(family, task, config, path, must_be_whole, replaces_head, dtype, seed, by_rows):
    """Return a model without an adapter and the names of its newly initialized weights; see [`build_model`]."""
    vocab_size = config.vocab_size
    try:
        stored_config = type(config).from_pretrained(str(path))
    except Exception as error:
        raise ModelError(f"the model {path} cannot be loaded: {first_line(error)[:300]}") from None
    config.vocab_size = stored_config.vocab_size
    model, loading_info = weights.load(FAMILIES[family].tasks[task], path, config, dtype, seed if by_rows else None)
    new = _find_new_weights(family, task, model, path, loading_info, must_be_whole, replaces_head, stored_config)
    weights.warn_unused(path, loading_info["unused"])
    if vocab_size > stored_config.vocab_size:
        grow_vocabulary(model, vocab_size, seed)
        new.append(f"{plural(vocab_size - stored_config.vocab_size, 'row')} of the vocabulary")
        config.vocab_size = vocab_size
    return model, new


def _check_lora(pretrained, base, is_trained):
    if not pretrained:
        raise ModelError("lora: it needs a trained model to add to; give --init_from FOLDER_OR_HUB_ID")
    if base and not is_trained:
        raise ModelError(
            f"{pretrained} is an adapter itself: make a whole model of it first; resume its run with --merge_lora"
        )


def _explain(error, pretrained, base):
    """Return the error; if it is about the base model of an adapter, with the file that names that model."""
    if not base:
        return error
    where = f"{pretrained}/adapter_config.json names it as base_model_name_or_path, and can be changed there"
    return ModelError(f"{error}; {where}")


def _initialize(family, task, config, seed, dtype, on_meta):
    """Return a new model, which has the same weights with `implementation: stock` as without; see [`build_model`]."""
    model_class, own = FAMILIES[family].tasks[task], dict.get(FAMILIES, family.removeprefix("stock:"))
    try:
        model = make_on_meta(model_class, config)
    except Exception as error:  # of a stock class, which does not check its configuration
        raise ModelError(
            f"config of {family}: no {model_class.__name__} can be made of it ({type(error).__name__}: "
            f"{first_line(error)}); correct it"
        ) from None
    size, memory = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize, physical_memory()
    # It would be made layer by layer until the machine has no memory left.
    if memory and size > memory and not on_meta:
        raise ModelError(
            f"a {family} of this config cannot be made: its weights take {size / 1e9:,.1f} GB, and this machine has "
            f"{memory / 1e9:,.1f} GB of memory; reduce its sizes"
        )
    try:
        weights = InitialWeights(model, seed, dtype)
        if family.startswith("stock:") and own and task in own.tasks:
            own_model = make_on_meta(own.tasks[task], own.config.from_dict(config.to_dict()))
            weights.update(InitialWeights(own_model, seed, dtype))
        if not on_meta:
            return weights.materialize()
        model.read_rows = weights.rows
        return model
    except (RuntimeError, MemoryError) as error:
        raise ModelError(f"a {family} of this config cannot be made; reduce its sizes: {first_line(error)}") from None


def physical_memory():
    """Return the bytes of memory of this machine, None if unknown."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _find_new_weights(family, task, model, path, loading_info, must_be_whole, replaces_head, stored_config):
    """Return the names of the weights that a checkpoint lacks, and that were therefore newly initialized.

    Raises:
        ModelError: it lacks more than a head may lack, or its weights have other sizes.
    """
    new, mismatched = (sorted(loading_info[keys]) for keys in ("missing_keys", "mismatched_keys"))
    heads = _heads(model)
    if replaces_head and not must_be_whole:
        new += [name for name, *_ in mismatched if name.split(".")[0] in heads]
        mismatched = [entry for entry in mismatched if entry[0].split(".")[0] not in heads]
    _check_fit(path, mismatched, "the recipe's config")
    missing = [name for name in new if must_be_whole or (name.split(".")[0] not in heads and ".pooler." not in name)]
    if missing:
        trained_tasks = [
            name
            for name, other in FAMILIES[family].tasks.items()
            if FAMILIES[family].stock_name(other.__name__) in (stored_config.architectures or [])
        ]
        hint = f"; it was trained for --task {trained_tasks[0]}" if trained_tasks and task not in trained_tasks else ""
        raise ModelError(
            f"the model {path} lacks weights that task {task} needs: {missing[0]} ({len(missing)} such){hint}"
        )
    return new


def _check_fit(path, mismatched, what):
    """Raise ModelError if weights have other sizes than a configuration says."""
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ModelError(
            f"the model {path} does not fit {what}: {name} is {tuple(stored)} in the file and {tuple(expected)} by the "
            f"config ({len(mismatched)} such)"
        )


def _heads(model):
    """Return name -> module of everything on top of the model without a head. T5 has a head beside its two stacks."""
    body = {model.base_model_prefix}
    if model.base_model is model:
        body = {name for name, module in model.named_children() if module is not model.get_output_embeddings()}
    return {name: head for name, head in model.named_children() if name not in body}
