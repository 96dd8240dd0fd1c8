"""The tokenizer: load one, or train one on the recipe's own text."""

import hashlib
import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer

from ..errors import InputError, first_line

END_OF_TEXT = "<|endoftext|>"


def load(name):
    """The tokenizer of a folder or of the Hugging Face Hub.

    Raises:
        InputError: there is none by that name, or it is not one of the fast kind.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library's own errors are of many classes, and all mean this
        raise InputError(
            f"tokenizer '{name}' cannot be found: it is not a folder with tokenizer files here, and the Hugging Face "
            f"Hub did not give it ({first_line(error)[:200]}); give a folder, a Hub id, or "
            "{train: bpe, vocab_size: 8192}"
        ) from None
    if not tokenizer.is_fast or len(tokenizer) < 2:  # it makes an empty one of a config.json alone
        raise InputError(f"tokenizer '{name}' has no tokenizer.json or vocabulary that the tokenizers library reads")
    return tokenizer


def train_bpe(texts, vocab_size):
    """A byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2, so that no text is unknown), as the class
    that AutoTokenizer gives for GPT-2."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    return GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def save(tokenizer, folder):
    """Write a tokenizer's files.

    Raises:
        OSError: they cannot be written; the tokenizers library itself raises a bare Exception.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise OSError(first_line(error)) from None


def fingerprint(tokenizer):
    """A digest of all that decides how text becomes tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def end_of_document(tokenizer):
    """The id that closes each document: end of text, or what the tokenizer has in its place."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token_id is not None:
            return token_id
    raise InputError(
        f"the tokenizer {tokenizer.name_or_path} has no end-of-text token to put between documents; "
        "set eos_token in its tokenizer_config.json"
    )


def token_bytes(tokenizer, vocab_size):
    """How many bytes of text each id stands for, special tokens none: (vocab_size,) int64.

    The loss per byte of text compares models whose tokenizers differ; the loss per token does not. None for WordPiece,
    which forgets the spaces, so that its tokens do not add up to the text. A tokenizer that normalizes text (T5's
    does) counts the text as normalized.
    """
    if "WordPiece" in repr(tokenizer.backend_tokenizer.decoder):
        return None
    counts = np.zeros(vocab_size, dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in special or token_id >= vocab_size:
            continue
        if byte_level:
            counts[token_id] = len(token)  # one character a byte
        elif len(token) == 6 and token.startswith("<0x"):
            counts[token_id] = 1  # SentencePiece's byte fallback
        else:
            counts[token_id] = len(token.replace("▁", " ").encode())
    return counts
