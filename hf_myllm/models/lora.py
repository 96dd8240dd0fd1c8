"""LoRA (Hu et al. 2022) with the library `peft`: small trainable matrices beside the frozen weights of a model.

A folder with an adapter names its base model. It also holds the configuration of the whole model, as model_config.json:
transformers takes a folder with a config.json for a whole model.

`peft` is imported inside the functions: its import takes longer than the rest of a command together.
"""

import json
import math
import os
import re
import warnings
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, first_line
from ..seeds import derive_seed
from . import find_family
from .initialization import materialize
from .revisions import resolve

_TASK_TYPES = {  # end of the model's class name -> peft's task type, which selects the peft class
    "CausalLM": "CAUSAL_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "ConditionalGeneration": "SEQ_2_SEQ_LM",
    # No type for question answering: its peft class drops the token types.
}
_ADAPTER_CONFIG = "adapter_config.json"
_MODEL_CONFIG = "model_config.json"
WEIGHTS = "adapter_model.safetensors"
_PEFT_HEADS = {"classifier", "score"}  # heads that peft itself trains and saves


def add(model, task, newly_initialized, seed, r, alpha=None, dropout=0.0, target_modules=None):
    """Return the model with trainable LoRA matrices; all other weights are frozen, except the newly initialized ones.

    Args:
        task: name of the task, for messages.
        newly_initialized: names of weights that the base model lacks; they are trained and saved as a whole.
        seed: of the matrices, each of which is drawn by its name.
        r: rank of the matrices.
        alpha: numerator of the scale alpha / r; default: 2 * r.
        target_modules: names of modules, ["all-linear"], or None for peft's default of the model type, all-linear if it
            has none.
    Raises:
        ModelError: peft finds no such modules in the model, or an adapter cannot hold the trained weights.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if rows := [name for name in newly_initialized if " " in name]:  # "2 rows of the vocabulary"
        raise ModelError(f"lora leaves the embeddings as they are, and the model lacks {rows[0]}: train without it")
    heads = sorted({name.rpartition(".")[0].split(".", 1)[-1] for name in newly_initialized} - _PEFT_HEADS)
    head_type = type(model).__name__.rpartition("For")[2]
    if heads and head_type in ("MaskedLM", "PreTraining"):
        raise ModelError(
            f"lora needs a model that has the head of task {task}, and this one lacks {newly_initialized[0]}"
        )
    if head_type == "QuestionAnswering":
        heads = sorted({*heads, "qa_outputs"})
    if target_modules is None:  # peft needs those of some mixtures of experts by name
        target_modules = DEFAULTS.get(model.config.model_type, ["all-linear"])
    config = LoraConfig(
        r=r,
        lora_alpha=alpha or 2 * r,
        lora_dropout=dropout,
        target_modules="all-linear" if target_modules == ["all-linear"] else target_modules,
        modules_to_save=heads or None,
        exclude_modules=sorted({*_PEFT_HEADS, *heads}),  # heads are trained as a whole
        task_type=_TASK_TYPES.get(head_type),
        revision=getattr(model, "hub_commit", None),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # its weight is (in, out)
    )
    if (path := Path(model.name_or_path)).exists():
        model.name_or_path = str(path.resolve())  # so that the adapter can be loaded from any working directory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns that the model lacks some of the excluded heads
            peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora: {first_line(error)[:300]}") from None
    if name := _find_tied(model):
        raise ModelError(f"lora: {name} shares its weight with another; remove it from target_modules")
    _read_by_rows(peft_model)
    for name, parameter in peft_model.named_parameters():  # from the distributions of peft; their partners are zeros
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(parameter, math.sqrt(5), generator=generator)
        elif ".lora_embedding_B." in name:
            torch.nn.init.normal_(parameter, generator=generator)
    return peft_model


def _read_by_rows(peft_model):
    """Give a peft model its trained weights, which are small, and a `read_rows`, if its base is on the meta device.

    Returns:
        whether it is.
    """
    if "read_rows" not in vars(base := peft_model.get_base_model()):
        return False
    read_rows = vars(base).pop("read_rows")

    def read_base(name, start=0, stop=None):
        name = re.sub(r"\.(base_layer|original_module|modules_to_save\.default)\b", "", name)
        return read_rows(name.removeprefix("base_model.model."), start, stop)

    def read(name, start=0, stop=None):
        return values[name][start:stop] if name in values else read_base(name, start, stop)

    values = {name: p.detach() for name, p in peft_model.named_parameters() if p.requires_grad}
    for name, value in values.items():
        if value.is_meta:
            new = torch.zeros_like(value, device="cpu") if ".lora_" in name else read_base(name).to(value.dtype)
            values[name] = new
    materialize(peft_model, values)
    peft_model.read_rows = read
    return True


def merge(peft_model):
    """Return the whole model, with the adapter's matrices added to its weights.

    Raises:
        ModelError: the adapter changes one of two modules that share a weight.
    """
    if name := _find_tied(peft_model.get_base_model()):
        raise ModelError(
            f"the adapter changes {name}, which shares its weight with another module; merge it with peft into a model "
            "with tie_word_embeddings false, and give that"
        )
    return peft_model.merge_and_unload()


def _find_tied(model):
    """Return the name of a module with matrices of LoRA whose weight is tied to that of another, or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tied = [model.get_input_embeddings(), model.get_output_embeddings()]
    is_tied = model.config.tie_word_embeddings and None not in tied
    changed = [module for module in tied if is_tied and isinstance(module, BaseTunerLayer)]
    return next((name for name, module in model.named_modules() if any(module is other for other in changed)), None)


def base_of(folder):
    """Return the base model that a folder's adapter names, or None if the folder holds no adapter.

    Raises:
        ModelError: the adapter's configuration cannot be read.
    """
    if folder is None or not (Path(folder) / _ADAPTER_CONFIG).is_file():
        return None
    try:
        config = json.loads((Path(folder) / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
        return resolve(f"{base}@{revision}") if revision and not os.path.exists(base) else base
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/{_ADAPTER_CONFIG} cannot be read: {error!r:.200}") from None


def config_of(folder):
    """Return where the configuration of a folder's whole model is: a file, or the base model of a foreign adapter."""
    path = Path(folder) / _MODEL_CONFIG
    return str(path if path.is_file() else base_of(folder) or folder)


def read_config(folder):
    """Return the configuration of a folder's whole model as a dict, as its file has it."""
    path = config_of(folder) if base_of(folder) else Path(folder) / "config.json"
    return json.loads(Path(path).read_text(encoding="utf-8"))


def head_of(architecture):
    """Return the head in the name of a stock class: what follows "For"."""
    if architecture == "MarianMTModel":
        return "ConditionalGeneration"
    return architecture.partition("For")[2] or "CausalLM"  # GPT2LMHeadModel


def how_to_load(folder, name=None):
    """Return the line of Python that loads a folder's model with stock transformers, or its adapter with stock peft.

    Args:
        name: what the line passes instead of the folder, for example a Hub id.
    """
    base = base_of(folder)
    name = json.dumps(str(name or folder), ensure_ascii=False)  # a JSON string is a Python string
    config = read_config(folder)
    head = head_of(config["architectures"][0]).replace("ConditionalGeneration", "Seq2SeqLM")  # the Auto class's ending
    if base and head in ("MaskedLM", "PreTraining", "QuestionAnswering"):
        return f'PeftModel.from_pretrained(AutoModelFor{head}.from_pretrained("{base}"), {name})'
    if base:
        settings = ""
        if head.endswith("Classification"):
            settings = f", num_labels={len(config.get('id2label', (0, 1)))}"  # two labels are not in the configuration
            family = find_family(config["model_type"])
            if family is None or family.is_decoder:
                settings += f", pad_token_id={config.get('pad_token_id')}"
        return f"AutoPeftModelFor{head}.from_pretrained({name}{settings})"
    return f"AutoModelFor{head}.from_pretrained({name})"


def load(model, folder):
    """Return the base model with the adapter of a folder, ready to continue its training.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*a no-op")  # on the meta device; see below
            peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:
        raise ModelError(f"the adapter in {folder} does not fit its model: {first_line(error)[:300]}") from None
    if _read_by_rows(peft_model):
        load_weights(peft_model, folder)
    return peft_model


def is_added(model):
    """Return whether a model is a peft model around another."""
    return hasattr(model, "get_base_model")


def save(model, folder, weights=None):
    """Write the adapter of a peft model, and the configuration of the whole model.

    Args:
        weights: in place of those of the model, by the names of its `state_dict`.
    """
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
    path = Path(folder) / _ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_mapping"] = None  # would name our classes instead of the stock ones
    config["exclude_modules"] = None  # not needed any more, and peft would warn about it
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    (Path(folder) / "README.md").unlink(missing_ok=True)  # peft's card contains local paths
    whole_model = model.get_base_model()
    whole_model.config.architectures = [type(whole_model).__name__.removeprefix("FSDP")]
    whole_model.config.to_json_file(Path(folder) / _MODEL_CONFIG)
    if whole_model.can_generate():
        whole_model.generation_config.save_pretrained(folder)


def weights(model):
    """Return the weights that [`save`] writes."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def load_weights(model, folder):
    """Load the adapter of a checkpoint into a peft model with an adapter of the same settings."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
