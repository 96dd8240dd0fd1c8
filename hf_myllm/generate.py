"""Text from a trained folder: `python -m hf_myllm.generate RUN --prompt "Once upon a time"`; a masked-LM model fills in
what the prompt leaves open: `--prompt "Once upon a [MASK]"`."""

import sys

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer, GenerationConfig, TextStreamer
from transformers.utils import logging

from . import checkpoint
from .errors import InputError
from .models import loading, lora


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
    """The prompt and its continuation.

    Args:
        prompt: text; "" starts from the token between documents.
        max_new_tokens: at most, and no further than the model has positions.
        temperature: 0, and anything below a thousandth, takes the likeliest token each time.
        top_k: 0 draws from all tokens.
        seed: of torch's generator, which this sets.
        streamer: gets the tokens as they come, as [`~transformers.TextStreamer`] does.
        is_chat: whether the prompt is what a user says, in the form of the tokenizer's chat template.
    Raises:
        InputError: the prompt leaves no position to generate at.
    """
    if lora.is_added(model):  # peft would write what is said here into the configuration that is saved
        model = model.get_base_model()
    ids, is_empty = encode_prompt(tokenizer, prompt, model.config.max_position_embeddings, is_chat)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    is_sampled = temperature >= 1e-3  # colder is the likeliest token, and divides by nothing
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, model.config.max_position_embeddings - len(ids)),
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        do_sample=is_sampled,
        **(sampling if is_sampled else {}),
    )
    inputs = torch.tensor([ids], device=model.device)
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # what is not said here would be taken from the model's own
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                streamer=streamer,
                synced_gpus=isinstance(model, FSDPModule),  # then no process stops before the others
            )
    finally:
        model.generation_config = own_config
        model.train(was_training)
    return tokenizer.decode(output[0][1 if is_empty else 0 :], skip_special_tokens=True)


def _ends(model, tokenizer):
    """The tokens that end a text: the tokenizer's, and those that the model was saved with, as of chats."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends) or None


def encode_prompt(tokenizer, prompt, positions, is_chat=False):
    """The ids to start from, and whether they are only the token that stands between documents.

    A tokenizer that puts a token before each text does so here too, as in stock pipelines.

    Raises:
        InputError: the prompt leaves no position to generate at, or is empty and there is no token to start from.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not UTF-8 at place {error.start}") from None
    if is_chat:
        if tokenizer.chat_template is None:
            raise InputError("the tokenizer has no chat template: leave out --chat")
        said = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"] if prompt else []
    while (
        ids
        and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
        and not prompt.endswith(tokenizer.convert_ids_to_tokens(ids[-1]))
    ):
        ids.pop()  # the end is still to come
    if len(ids) >= positions:
        raise InputError(f"the prompt has {len(ids)} tokens, and the model only {positions} positions: shorten it")
    if len(ids):
        return list(ids), False
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if start is not None:
            return [start], True
    raise InputError("the tokenizer has no token to start an empty prompt from: give some text")


@torch.no_grad()
def fill_in(model, tokenizer, text, guesses=5):
    """The text, and below it the likeliest tokens at each of its mask tokens, with their probabilities.

    Raises:
        InputError: the text has no mask token, or is too long.
    """
    ids = torch.tensor([encode_masked(tokenizer, text, model.config.max_position_embeddings)], device=model.device)
    was_training = model.training
    model.eval()
    outputs = model(ids)
    model.train(was_training)
    logits = outputs.logits if "logits" in outputs else outputs.prediction_logits
    lines = [text]
    for place in (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]:
        chances, likeliest = logits[0, place].float().softmax(-1).topk(min(guesses, logits.shape[-1]))
        pairs = zip(chances.tolist(), likeliest.tolist(), strict=True)
        said = "   ".join(f"{tokenizer.decode([number]).strip()} {chance:.1%}" for chance, number in pairs)
        lines.append(f"{tokenizer.mask_token}  {said}")
    return "\n".join(lines)


def encode_masked(tokenizer, text, positions):
    """The ids of a text with mask tokens.

    Raises:
        InputError: it has none, or more tokens than the model has positions.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not UTF-8 at place {error.start}") from None
    ids = tokenizer(text)["input_ids"]
    if len(ids) > positions:
        raise InputError(f"the text has {len(ids)} tokens, and the model only {positions} positions: shorten it")
    if tokenizer.mask_token_id not in ids:
        mask = tokenizer.mask_token
        raise InputError(
            f"a masked-LM model fills in what is left open: put {mask} in the text, as in 'a {mask} house'"
        )
    return ids


def find_model(run):
    """The folder of a run's model, its root or, while there is none yet, its newest checkpoint; and the tokenizer."""
    folder = checkpoint.find_model(run)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception:
        tokenizer = ()
    if len(tokenizer) < 2:  # what AutoTokenizer makes of a config.json alone
        raise InputError(f"{folder} holds no tokenizer; save the data's own there with tokenizer.save_pretrained")
    return folder, tokenizer


def load(run, device="cpu"):
    """The model and tokenizer at a run's root; while the run has none there yet, its newest checkpoint's."""
    folder, tokenizer = find_model(run)
    if loading.read_architecture(folder).endswith(("Classification", "QuestionAnswering")):
        raise InputError(f"{run} judges text and writes none: python -m hf_myllm.predict {run} --input FILE")
    return loading.load_stock_model(folder).to(device), tokenizer


class _Terminal(TextStreamer):
    """Each word as soon as it is whole; what the prompt is stands before it."""

    def on_finalized_text(self, text, stream_end=False):
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


def print_texts(run_dir, prompt, chat, max_new_tokens, temperature, top_k, top_p, num_samples, seed):
    """Print generated texts word by word; a masked language model fills in the prompt's [MASK] instead.

    Args:
        run_dir: folder of a run, a checkpoint or any model.
        chat: apply the chat template to the prompt.
        others: see [`generate_text`]; sample i uses `seed + i`.
    """
    for name, value, low, high in (
        ("max_new_tokens", max_new_tokens, 1, None),
        ("temperature", temperature, 0, 100),
        ("top_k", top_k, 0, None),
        ("top_p", top_p, 0, 1),
        ("num_samples", num_samples, 1, None),
        ("seed", seed, 0, 2**62),
    ):
        if not low <= value or (high is not None and value > high) or (name == "top_p" and value == 0):
            bound = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InputError(f"--{name} cannot be {value}; it must be {bound}{', and not 0' * (name == 'top_p')}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, tokenizer = load(run_dir, device)
    if not model.can_generate():
        print(fill_in(model, tokenizer, prompt))
        return
    for index in range(num_samples):
        if num_samples > 1:
            print(f"--- sample {index + 1} of {num_samples}, seed {seed + index}")
        streamer = _Terminal(tokenizer, skip_prompt=chat or not prompt, skip_special_tokens=True)
        sampling = max_new_tokens, temperature, top_k, top_p, seed + index
        generate_text(model, tokenizer, prompt, *sampling, streamer=streamer, is_chat=chat)


if __name__ == "__main__":
    from .cli import main

    main(["generate", *sys.argv[1:]])
