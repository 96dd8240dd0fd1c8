"""LoRA: small matrices beside the model's own, which alone are trained (Hu et al. 2022), by the library `peft`.

A folder that holds such an adapter names the model that it adds to, and has the whole model's configuration beside it,
under another name than config.json: where there is one, transformers takes the folder for the whole model.

`peft` takes longer to import than all the rest of a command together, so it is where it is needed.
"""

import json
import warnings
from pathlib import Path

from transformers.pytorch_utils import Conv1D

from ..errors import InputError, first_line
from . import find_family

_TYPES = {  # what peft calls the tasks, by which its Auto classes choose theirs
    "causal": "CAUSAL_LM",
    "instruction": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",  # of questions none: its class drops the token types
}
_CONFIG = "adapter_config.json"
_WHOLE = "model_config.json"
_OF_PEFT = {"classifier", "score"}  # the heads that it trains and saves by itself


def add(model, task, fresh, r, alpha=None, dropout=0.0, target_modules=None):
    """The model with LoRA's matrices, all else frozen but what is fresh.

    Args:
        fresh: names of weights that the model of init_from did not have, which are trained and saved whole.
        target_modules: names of modules, ["all-linear"], or None for what peft takes in this family.
    Raises:
        InputError: peft knows no such modules in the model, or what is asked for cannot be kept in an adapter.
    """
    from peft import LoraConfig, get_peft_model

    if odd := [name for name in fresh if " " in name]:  # no name of a weight
        raise InputError(f"lora leaves the embeddings as they are, and the model lacks {odd[0]}: train without it")
    heads = sorted({name.rpartition(".")[0].split(".", 1)[-1] for name in fresh} - _OF_PEFT)
    if heads and task in ("mlm", "mlm_nsp"):
        raise InputError(f"lora needs a model that has the head of task {task}, and this one lacks {fresh[0]}")
    if task == "question_answering":
        heads = sorted({*heads, "qa_outputs"})
    config = LoraConfig(
        r=r,
        lora_alpha=alpha or 2 * r,
        lora_dropout=dropout,
        target_modules="all-linear" if target_modules == ["all-linear"] else target_modules,
        modules_to_save=heads or None,
        exclude_modules=sorted({*_OF_PEFT, *heads}),  # of the heads, all is trained
        task_type=_TYPES.get(task),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # its weight is (in, out)
    )
    if (path := Path(model.name_or_path)).exists():
        model.name_or_path = str(path.resolve())  # the adapter names it, wherever it is loaded from
    tied = [model.get_input_embeddings(), model.get_output_embeddings()] if model.config.tie_word_embeddings else []
    shared = {name for name, module in model.named_modules() if any(module is one for one in tied)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a model has none of the heads named above
            added = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"lora: {first_line(error)[:300]}") from None
    for name, _ in added.named_parameters():
        if ".lora_" in name and (whose := name.partition(".lora_")[0].removeprefix("base_model.model.")) in shared:
            raise InputError(f"lora: {whose} shares its weight with another: leave it out of target_modules")
    return added


def base_of(folder):
    """The model that a folder's adapter adds to, or None where the folder holds none.

    Raises:
        InputError: the adapter's configuration cannot be read.
    """
    if folder is None or not (Path(folder) / _CONFIG).is_file():
        return None
    try:
        return json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/{_CONFIG} cannot be read: {error!r:.200}") from None


def config_of(folder):
    """Where the configuration of a folder's whole model is; of an adapter of others', its model's."""
    whole = Path(folder) / _WHOLE
    return str(whole if whole.is_file() else base_of(folder) or folder)


def read_config(folder):
    """The configuration of a folder's whole model, as its file has it."""
    path = config_of(folder) if base_of(folder) else Path(folder) / "config.json"
    return json.loads(Path(path).read_text(encoding="utf-8"))


def how_to_load(folder, name=None):
    """The line of Python that loads the model of a folder with stock transformers, or its adapter with stock peft.

    Args:
        name: what the line calls the folder by; default: the folder.
    """
    base, called = base_of(folder), name or folder
    name = json.dumps(str(called), ensure_ascii=False)  # as Python reads it too
    config = read_config(folder)
    kind = config["architectures"][0].partition("For")[2] or "CausalLM"  # of GPT2LMHeadModel
    if base and kind in ("MaskedLM", "PreTraining", "QuestionAnswering"):
        return f'PeftModel.from_pretrained(AutoModelFor{kind}.from_pretrained("{base}"), {name})'
    if base:
        more = ""
        if kind.endswith("Classification"):  # of two labels, configurations say nothing
            more = f", num_labels={len(config.get('id2label', (0, 1)))}"
            family = find_family(config["model_type"])
            if family is None or family.is_decoder:
                more += f", pad_token_id={config.get('pad_token_id')}"
        return f"AutoPeftModelFor{kind}.from_pretrained({name}{more})"
    return f"AutoModelFor{kind}.from_pretrained({name})"


def load(model, folder):
    """The model with the adapter of a folder, to be trained on."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except Exception as error:
        raise InputError(f"the adapter in {folder} does not fit its model: {first_line(error)[:300]}") from None


def is_added(model):
    """Whether it is peft's model around another."""
    return hasattr(model, "get_base_model")


def save(model, folder):
    """Write the adapter, and the whole model's configuration."""
    model.save_pretrained(folder, save_embedding_layers=False)
    path = Path(folder) / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_mapping"] = None  # which would name our classes rather than the stock ones
    config["exclude_modules"] = None  # said when they were added, and a warning to whoever loads it
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    (Path(folder) / "README.md").unlink(missing_ok=True)  # which names folders of this machine
    whole = model.get_base_model()
    whole.config.architectures = [type(whole).__name__]
    whole.config.to_json_file(Path(folder) / _WHOLE)
    if whole.can_generate():
        whole.generation_config.save_pretrained(folder)


def load_weights(model, folder):
    """Load the adapter of a checkpoint into a model that has one."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
