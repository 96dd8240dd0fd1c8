"""Check that stock transformers loads a model and computes the same outputs as the class that trained it."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load, save_file

from ..errors import HubError, first_line
from ..files import regular_files
from ..models import find_family, loading, lora
from ..models.auto import num_positions

SCRIPT = Path(__file__).with_name("run_stock_model.py")
# Environment variables of a launch, by prefix: the check and a push are single processes of their own.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def check(folder):
    """Compare the outputs of a folder's model in stock transformers, in its own process, with those of our class.

    Raises:
        HubError: the folder holds no model of our families, stock transformers cannot load it, or the outputs differ.
    """
    base, config_path = lora.base_of(folder), lora.config_of(folder)
    if base and Path(base).exists():
        raise HubError(
            f"{folder}: it is an adapter to the model in {base}, which nobody else has; train with merge_lora, or from "
            "a model of the Hub"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(config_path, trust_remote_code=False)
        architecture = (config.architectures or ["none"])[0]
        family = find_family(config.model_type)
        if family is None:
            raise ValueError(f"model_type {config.model_type} cannot be trained here")
        own_classes = {family.stock_name(cls.__name__): cls for cls in family.tasks.values()}
        own_class = own_classes[architecture]
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise HubError(f"{folder}: it holds no model that can be pushed: {first_line(error)[:200]}") from None
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(64, num_positions(config) or 64))
    inputs = {"input_ids": torch.randint(config.vocab_size, shape, generator=generator)}
    inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    stock_outputs = _run_stock(folder, architecture, base, config_path, inputs)
    model = loading.load_model(own_class, folder, family.config.from_pretrained(config_path), torch.float32)
    with torch.no_grad():
        outputs = [output for output in model(**inputs).to_tuple() if isinstance(output, torch.Tensor)]
    for index, output in enumerate(outputs):
        expected = stock_outputs[str(index)]
        difference = (output - expected).abs().max().item() if expected.shape == output.shape else float("inf")
        # Both are fp32, but our GPT computes GELU in one operation, which changes the last digits.
        if not difference <= 1e-4 * max(1.0, output.abs().max().item()):
            raise HubError(f"{folder}: stock transformers computes other outputs (logits differ by {difference})")


def layout(folder):
    """Return a digest of what a model's files say beside the values of its weights, on which [`check`] depends: the
    configuration, and the name, type and shape of each tensor."""
    digest = hashlib.sha256()
    for path in regular_files(folder):
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:  # the length of the header, and the header
                digest.update(file.read(int.from_bytes(file.read(8), "little")))
        elif path.name in ("config.json", "adapter_config.json", "model_config.json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _run_stock(folder, architecture, base, config_path, inputs):
    """Return the outputs of stock transformers as {"0": tensor, ...}, computed in a process without this package."""
    with tempfile.TemporaryDirectory() as temporary:
        inputs_path, outputs_path = f"{temporary}/inputs", f"{temporary}/outputs"
        save_file(inputs, inputs_path)
        arguments = [Path(folder).resolve(), architecture, base or "", config_path, inputs_path, outputs_path]
        process = subprocess.run(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            cwd=temporary,
            env=single_process_environment(),
            capture_output=True,
            text=True,
        )
        if process.returncode:
            message = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise HubError(f"{folder}: stock transformers cannot load it: {message[:300]}")
        return load(Path(outputs_path).read_bytes())  # Windows cannot remove a file that is memory-mapped


def single_process_environment():
    """Return the environment without the launcher's variables and without the GPUs, which the training uses."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}
