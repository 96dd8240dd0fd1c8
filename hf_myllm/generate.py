"""Generate text with a trained model, or let a masked language model fill in a prompt's [MASK]."""

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from .cli import main

    main(["generate", *sys.argv[1:]])

import math
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer, GenerationConfig, TextStreamer

from . import checkpoint
from .data.tokenizer import as_trained, render_chat, special_affixes
from .distributed import check_no_other_run
from .errors import InputError, ModelError
from .files import read_yaml
from .models import loading, lora
from .models.auto import num_positions
from .precision import inference_precision

_COMMAND_DEFAULTS = {"max_new_tokens": 200, "temperature": 0.8, "top_k": 50, "top_p": 1.0, "num_samples": 1, "seed": 0}
_DECODER_STARTS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")  # of a generation config
_NUM_GUESSES = 5  # for a mask token
_NO_LIMIT = 1 << 30  # positions of a model with relative positions
_LIMITS = {  # option -> its lowest and highest value
    "max_new_tokens": (1, math.inf),
    "temperature": (0, 100),
    "top_k": (0, math.inf),
    "top_p": (1e-9, 1),
    "seed": (0, 2**62),
    "num_samples": (1, math.inf),
}


def load(run_dir, device=None):
    """Return the model of a run as a stock transformers model, and its tokenizer.

    Args:
        run_dir: folder of a run, of one of its checkpoints or of any model. A run that has not finished has the model
            of its newest checkpoint.
        device: default: the accelerator if there is one, else the CPU.
    Raises:
        InputError: the folder holds no model or no tokenizer, or they cannot be loaded.
    """
    folder = checkpoint.find_model(run_dir)
    tokenizer = load_tokenizer(folder)
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    with _preserved_random_state():
        return loading.load_stock_model(folder).to(device), tokenizer


def load_tokenizer(folder):
    """Return the tokenizer of a model's folder; raise ModelError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        tokenizer = ()
    if len(tokenizer) < 2:  # from a config.json alone, AutoTokenizer makes an empty tokenizer
        raise ModelError(f"{folder}: it holds no tokenizer; save the data's own there with tokenizer.save_pretrained")
    return as_trained(tokenizer, folder)


def read_recipe(run_dir):
    """Return the task, the settings of data and evaluation, and the precision of the recipe of a run or a checkpoint;
    for any other folder no task, no settings, and "auto".
    """
    try:
        folder = checkpoint.find_run_dir(Path(run_dir).resolve())
        recipe = read_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
        settings = {**recipe.get("evaluation", {}), **recipe["data"]}
        settings = {key: value for key, value in settings.items() if value is not None}
        precision = recipe.get("training", {}).get("precision", "auto")
        return {"task": recipe.get("task"), "settings": settings, "precision": precision}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"task": None, "settings": {}, "precision": "auto"}


def generate(run_dir, prompt="", max_new_tokens=100, temperature=0.8, top_k=50, top_p=1.0, seed=0):
    """Return the prompt and its continuation by the model of a run.

    A masked language model fills in the prompt's mask tokens instead; see [`fill_mask`]. To generate several texts,
    [`load`] the model once and call [`generate_text`].

    Args:
        run_dir: folder of a run, of one of its checkpoints or of any model.
        prompt: text; "" starts a new document.
        max_new_tokens: limit; generation also stops at the model's last position.
        temperature: below 0.001, decoding is greedy.
        top_k: sample from the k likeliest tokens; 0: from all.
        top_p: sample from the likeliest tokens up to this total probability.
        seed: of the sampling.
    Raises:
        InputError: the folder holds no model that generates text, or an argument is out of range.
    """
    check_no_other_run()
    if not isinstance(prompt, str):
        raise InputError(f"prompt: expected text, got {type(prompt).__name__}; give a string")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    _check_limits(max_new_tokens=max_new_tokens, **sampling)
    model, tokenizer = _load_generator(run_dir)
    with inference_precision(read_recipe(run_dir)["precision"], model.device):
        if not model.can_generate():
            return fill_mask(model, tokenizer, prompt)
        return generate_text(model, tokenizer, prompt, max_new_tokens, **sampling)


def print_texts(run_dir, prompt="", chat=False, **options):
    """Print generated texts while they are generated, or the prompt with its mask tokens filled in.

    Args:
        chat: make the prompt a user's message by the tokenizer's chat template.
        options: num_samples, the number of texts (text i has the seed `seed + i`), and those of [`generate`]; None is
            the default.
    """
    given = {name: value for name, value in options.items() if value is not None}
    sampling = _COMMAND_DEFAULTS | given
    _check_limits(**sampling)
    num_samples, seed = sampling.pop("num_samples"), sampling.pop("seed")
    model, tokenizer = _load_generator(run_dir)
    if not model.can_generate() and (given or chat):
        name = next(iter(given), "chat")
        raise InputError(f"--{name}: it has no effect, because the model of {run_dir} fills in masks; leave it out")
    if chat and model.config.is_encoder_decoder:
        raise InputError("--chat: it has no effect, because an encoder-decoder reads a text; leave it out")
    with inference_precision(read_recipe(run_dir)["precision"], model.device):
        if not model.can_generate():
            print(fill_mask(model, tokenizer, prompt))
            return
        for index in range(num_samples):
            if num_samples > 1:
                print(f"--- sample {index + 1} of {num_samples}, seed {seed + index}")
            options = sampling | {"seed": seed + index, "is_chat": chat}
            if model.config.is_encoder_decoder:  # whose sentinels a streamer leaves out
                print(generate_text(model, tokenizer, prompt, **options))
                continue
            streamer = TextStreamer(tokenizer, skip_prompt=chat or not prompt, skip_special_tokens=True)
            generate_text(model, tokenizer, prompt, streamer=streamer, **options)


def _check_limits(**options):
    for name, value in options.items():
        low, high = _LIMITS[name]
        if not isinstance(value, (int, float)):
            raise InputError(f"{name}: expected a number, got {value!r}; give one or leave it out")
        if not low <= value <= high:
            limit = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise InputError(f"{name}: {value} is out of range; give a number {limit}")


def _load_generator(run_dir):
    """Return the model and tokenizer of a run; raise ModelError if the model classifies text."""
    folder = checkpoint.find_model(run_dir)
    if loading.read_architecture(folder).endswith(("Classification", "QuestionAnswering")):
        raise ModelError(f"{run_dir}: its model labels text; use hf-myllm predict {run_dir} --input FILE")
    model, tokenizer = load(folder)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{run_dir}: its model has no head; train one with hf-myllm train --init_from {run_dir}")
    return model, tokenizer


def generate_text(
    model,
    tokenizer,
    prompt,
    max_new_tokens=100,
    temperature=0.8,
    top_k=50,
    top_p=1.0,
    seed=0,
    streamer=None,
    is_chat=False,
):
    """Return the prompt and its continuation; the global random state stays unchanged.

    Args:
        streamer: receives the tokens as they are generated; see [`~transformers.TextStreamer`].
        is_chat: make the prompt a user's message by the tokenizer's chat template.
        others: see [`generate`].
    Raises:
        InputError: the prompt leaves no position to generate at.
    """
    is_encoder_decoder, positions = model.config.is_encoder_decoder, num_positions(model.config) or _NO_LIMIT
    if is_encoder_decoder:
        ids, is_empty, num_read = encode_source(tokenizer, prompt, positions), False, 1
    else:
        ids, is_empty = encode_prompt(tokenizer, prompt, positions, is_chat)
        num_read = len(ids)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if temperature < 1e-3:  # the division by it would overflow
        sampling = {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, positions - num_read),
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    if is_encoder_decoder:
        for name in _DECODER_STARTS:
            setattr(config, name, getattr(model.generation_config, name))
    output = generate_ids(model, torch.tensor([ids]), config, seed, streamer)[0]
    if is_encoder_decoder:
        return decode_target(tokenizer, output)
    return tokenizer.decode(output[1 if is_empty else 0 :], skip_special_tokens=True)


@torch.no_grad()
def generate_ids(model, inputs, config, seed=0, streamer=None):
    """Return what the stock `generate` does; the model and the global random state stay unchanged.

    Args:
        inputs: (rows, length) token ids without padding.
        config: a `GenerationConfig`; unset values do not come from the model's own.
    """
    if lora.is_added(model):  # peft would copy the sampling settings into the configuration that is saved
        model = model.get_base_model()
    was_training, own_config, attention = model.training, model.generation_config, model.config._attn_implementation
    model.eval()
    if attention == "flex_attention":  # it would be compiled for the shapes of generation, twice
        model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig()
    inputs = inputs.to(model.device)
    try:
        with _preserved_random_state():
            torch.manual_seed(seed)
            return model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                streamer=streamer,
                synced_gpus=isinstance(model, FSDPModule),  # no rank stops before the others
            )
    finally:
        model.generation_config = own_config
        model.train(was_training)
        if attention == "flex_attention":
            model.set_attn_implementation(attention)


def _preserved_random_state():
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def end_tokens(model, tokenizer):
    """Return the tokens that end a text: the tokenizer's, and the model's own, for example the end of a chat turn."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends) or None


def encode_prompt(tokenizer, prompt, max_positions, is_chat=False):
    """Return the token ids to start from, and whether the prompt is empty and they only start a document.

    As in stock pipelines, the tokenizer may add a token before the text; a token that it adds at the end is removed.

    Raises:
        InputError: the prompt leaves no position to generate at, or is empty and the tokenizer has no start token.
    """
    _check_utf8(prompt)
    if is_chat:
        if tokenizer.chat_template is None:
            raise InputError("--chat: the tokenizer has no chat template; leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        try:
            prompt = render_chat(tokenizer, messages, add_generation_prompt=True)
        except ValueError as error:
            raise ModelError(f"--chat: {error}; leave out --chat") from None
    ids = list(tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]) if prompt else []
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    while ids and ids[-1] in ends and not prompt.endswith(tokenizer.convert_ids_to_tokens(ids[-1])):
        ids.pop()
    _check_length(ids, max_positions - 1)
    if ids:
        return ids, False
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if start is not None:
            return [start], True
    raise InputError("prompt: it is empty, and the tokenizer has no token to start from; give some text")


def encode_source(tokenizer, text, max_positions):
    """Return the token ids that an encoder reads.

    Raises:
        InputError: the text is empty, or has more tokens than the model has positions.
    """
    _check_utf8(text)
    if not text:
        raise InputError("prompt: it is empty, and an encoder-decoder reads a text; give some")
    before, after = special_affixes(tokenizer)
    ids = [*before, *tokenizer(text, add_special_tokens=False)["input_ids"], *after]
    _check_length(ids, max_positions)
    return ids


def decode_target(tokenizer, ids):
    """Return generated token ids as text, without special tokens but with sentinels, such as <extra_id_0>."""
    special = set(tokenizer.all_special_ids)
    kept = [i for i in ids.tolist() if i not in special or "extra_id_" in tokenizer.convert_ids_to_tokens(i)]
    return tokenizer.decode(kept)


@torch.no_grad()
def fill_mask(model, tokenizer, text):
    """Return the text and, in a line for each of its mask tokens, the likeliest tokens with their probabilities.

    Raises:
        InputError: the text has no mask token, or is too long.
    """
    positions = num_positions(model.config) or _NO_LIMIT
    ids = torch.tensor([encode_masked(tokenizer, text, positions)], device=model.device)
    was_training = model.training
    model.eval()
    outputs = model(ids)
    model.train(was_training)
    logits = outputs.logits if "logits" in outputs else outputs.prediction_logits
    lines = [text]
    for position in (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]:
        likeliest = logits[0, position].float().softmax(-1).topk(min(_NUM_GUESSES, logits.shape[-1]))
        pairs = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        guesses = [f"{tokenizer.decode([token_id]).strip()} {probability:.1%}" for probability, token_id in pairs]
        lines.append(f"{tokenizer.mask_token}  {'   '.join(guesses)}")
    return "\n".join(lines)


def encode_masked(tokenizer, text, max_positions):
    """Return the token ids of a text with mask tokens.

    Raises:
        InputError: it has no mask token, or more tokens than the model has positions.
    """
    _check_utf8(text)
    ids = tokenizer(text)["input_ids"]
    _check_length(ids, max_positions)
    if tokenizer.mask_token_id not in ids:
        mask = tokenizer.mask_token
        raise InputError(
            f"prompt: a masked language model fills in {mask}; put {mask} in the text, as in 'a {mask} house'"
        )
    return ids


def _check_utf8(prompt):
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: it is not UTF-8 at character {error.start}; correct it") from None


def _check_length(ids, limit):
    if len(ids) > limit:
        raise InputError(f"prompt: it has {len(ids)} tokens and the model takes at most {limit}; shorten it")
