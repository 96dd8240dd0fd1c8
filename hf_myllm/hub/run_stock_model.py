"""Load a model with stock transformers and save its outputs; run as a script by [`stock_check`].

Imports nothing of this package, so that the model is loaded as on any other machine.

Arguments: folder, architecture, base model of an adapter or "", configuration, inputs, outputs.
"""

import sys

sys.path.pop(0)  # the folder of this script, whose files could hide other modules

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def load_model(folder, architecture, base, config_path):
    model_class = getattr(transformers, architecture)
    if base:
        from peft import PeftModel

        config = transformers.AutoConfig.from_pretrained(config_path, trust_remote_code=False)
        model = model_class.from_pretrained(base, config=config, dtype=torch.float32, trust_remote_code=False)
        return PeftModel.from_pretrained(model, folder)
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]) + sorted(info["mismatched_keys"]):
        sys.exit(f"the file has no {missing[0]}" + f" and lacks {len(missing) - 1} more" * (len(missing) > 1))
    return model


def check_tokenizer(folder, vocab_size):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer("Once upon a time, 1 + 1 = 2.")["input_ids"]
    size = 1 + max(tokenizer.get_vocab().values())
    if not ids or size > vocab_size:
        sys.exit(f"its tokenizer has {size} token ids, but the model has {vocab_size} embeddings")


if __name__ == "__main__":
    folder, architecture, base, config_path, inputs, outputs = sys.argv[1:]
    transformers.utils.logging.set_verbosity_error()
    model = load_model(folder, architecture, base, config_path).eval()
    with torch.no_grad():
        tensors = [value for value in model(**load_file(inputs)).to_tuple() if isinstance(value, torch.Tensor)]
    save_file({str(index): tensor.contiguous() for index, tensor in enumerate(tensors)}, outputs)
    if any((Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        check_tokenizer(folder, model.config.vocab_size)
    assert not any(name.split(".")[0] == "hf_myllm" for name in sys.modules)
