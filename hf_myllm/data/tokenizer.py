"""The tokenizer: load one, or train one on the recipe's own text."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from ..errors import ModelError, first_line

END_OF_TEXT = "<|endoftext|>"
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SENTENCE_ENDS = tuple(".!?\u2026\u3002\uff01\uff1f\n")  # and the ellipsis and the wide ones of East Asia


def load(name, model_type=None):
    """The tokenizer of a folder or of the Hugging Face Hub.

    Args:
        model_type: whose kind of tokenizer to expect in a folder that does not say, as "bert".
    Raises:
        ModelError: there is none by that name, or it is not one of the fast kind.
    """
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception:
            if model_type is None:
                raise
            tokenizer = AutoTokenizer.from_pretrained(name, config=AutoConfig.for_model(model_type))
    except Exception as error:  # the library's own errors are of many classes, and all mean this
        raise ModelError(
            f"tokenizer '{name}' cannot be found: it is not a folder with tokenizer files here, and the Hugging Face "
            f"Hub did not give it ({first_line(error)[:200]}); give a folder, a Hub id, or "
            "{train: bpe, vocab_size: 8192}"
        ) from None
    if not tokenizer.is_fast or len(tokenizer) < 2:  # it makes an empty one of a config.json alone
        raise ModelError(f"tokenizer '{name}' has no tokenizer.json or vocabulary that the tokenizers library reads")
    return tokenizer


def train_bpe(texts, vocab_size):
    """A byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2, so that no text is unknown), as the class
    that AutoTokenizer gives for GPT-2."""
    trained = _train_on_bytes(models.BPE(), trainers.BpeTrainer, texts, vocab_size)
    model = json.loads(trained.to_str())["model"]
    return GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def train_unigram(texts, vocab_size):
    """A byte-level unigram tokenizer (Kudo 2018; bytes, so that no text is unknown).

    The library's trainer adds up in another order each time, so that two trainings of it differ a little: one of them
    is kept, in the cache and in the run's folder.
    """
    trained = _train_on_bytes(models.Unigram(), trainers.UnigramTrainer, texts, vocab_size)
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _train_on_bytes(model, trainer, texts, vocab_size):
    trained = Tokenizer(model)
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"special_tokens": [END_OF_TEXT], "initial_alphabet": alphabet, "show_progress": False}
    trained.train_from_iterator(texts, trainer(vocab_size=vocab_size, **settings))
    return trained


def train_wordpiece(texts, vocab_size):
    """A WordPiece tokenizer (Wu et al. 2016) with BERT's special tokens and its splitting at spaces and punctuation,
    capitals kept, as the class that AutoTokenizer gives for BERT.

    Args:
        texts: read twice, so not an iterator.
    """
    # The library's own trainer numbers characters as they come out of a hash table, otherwise in each process, and
    # breaks ties by number. So the characters are numbered here; the rest of its work is that of BPE.
    counts = Counter()
    for text in texts:
        counts.update(text)
    alphabet, room = [], (vocab_size - len(BERT_SPECIAL_TOKENS)) * 3 // 4
    for character, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        forms = [character] if _stands_alone(character) else [character, "##" + character]
        if not character.isspace() and len(alphabet) + len(forms) <= room:
            alphabet += forms
    trained = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=False)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    single = [form for form in alphabet if not form.startswith("##")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_SPECIAL_TOKENS, *sorted(alphabet)],
        initial_alphabet=single,
        limit_alphabet=len(single),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=False)


def _stands_alone(character):
    """Whether BERT's splitting makes a word of each such character: punctuation, and Chinese characters."""
    is_symbol = character.isascii() and not character.isalnum()
    return is_symbol or unicodedata.category(character).startswith("P") or "\u4e00" <= character <= "\u9fff"


TRAINERS = {"bpe": train_bpe, "unigram": train_unigram, "wordpiece": train_wordpiece}


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
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # how it was found here
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if config.get("tokenizer_class") == "LlamaTokenizer":  # else transformers 4 and llama.cpp add a BOS of their own
        ids = tokenizer("a")["input_ids"]
        config["add_bos_token"] = ids[0] == tokenizer.bos_token_id
        config["add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(tokenizer):
    """A digest of all that decides how text becomes tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def end_of_document(tokenizer):
    """The ids that close each document: end of text; or, as BERT has it, [SEP] and the [CLS] that opens the next."""
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    if tokenizer.sep_token_id is not None:
        return [number for number in (tokenizer.sep_token_id, tokenizer.cls_token_id) if number is not None]
    raise ModelError(
        f"the tokenizer {tokenizer.name_or_path} has no end-of-text token to put between documents; "
        "set eos_token in its tokenizer_config.json"
    )


def safe_split_pattern(tokenizer):
    """A pattern of where text may be cut and still give the same tokens (what it matches is left out), or None where
    none is known."""
    added = tokenizer.added_tokens_decoder.values()
    if any(token.rstrip or any(character.isspace() for character in token.content) for token in added):
        return None  # such a token may stand across the cut
    # the text is split at added tokens first, so that a space before one belongs to nothing
    word = f"(?!{'|'.join(re.escape(token.content) for token in added) or '(?!)'})\\S"
    backend = tokenizer.backend_tokenizer
    normalizer, splitter = repr(backend.normalizer), repr(backend.pre_tokenizer)
    if splitter.startswith("ByteLevel(add_prefix_space=False") and "use_regex=True" in splitter:
        # GPT-2's splitting never joins such a break or space to what is before it
        return re.compile(rf"(?=\n{word})|(?<=\S)(?= {word})") if normalizer == "None" else None
    if splitter.startswith("BertPreTokenizer"):
        return re.compile(r"[ \t\r\n]+")
    if splitter.startswith("Sequence(pretokenizers=[WhitespaceSplit(), Metaspace("):
        return re.compile(rf"[ \t\r\n]+(?=\w)(?={word})")
    is_llamas = re.match(r'Metaspace\(replacement="▁", prepend_scheme=(first|always), split=False', splitter)
    if is_llamas and normalizer == "None" and not any(re.search("[^▁]▁", token) for token in tokenizer.get_vocab()):
        # it puts a space before each text: the cut takes one away; and no token has a space inside
        return re.compile(rf"(?<=[^\s▁]) (?!▁)(?={word})")
    return None


def token_bytes(tokenizer, vocab_size):
    """How many bytes of text each id stands for, special tokens none: (vocab_size,) int64.

    The loss per byte of text compares models whose tokenizers differ; the loss per token does not. None for WordPiece,
    which forgets the spaces, so that its tokens do not add up to the text. A tokenizer that normalizes text (T5's
    does) counts the text as normalized.
    """
    if _is_wordpiece(tokenizer):
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


def special_ids(tokenizer):
    """The ids that stand for no text."""
    return sorted(set(tokenizer.all_special_ids))


def continues_word(tokenizer, vocab_size):
    """Which tokens are one word with the token before them.

    Returns:
        joins: (vocab_size,) bool, whether an id goes on with a word, if the one before it lets it.
        joinable: (vocab_size,) bool, whether it does.
    """
    joins, joinable = np.zeros(vocab_size, dtype=bool), np.zeros(vocab_size, dtype=bool)
    is_wordpiece = _is_wordpiece(tokenizer)
    for number, text in _texts(tokenizer, vocab_size):
        if is_wordpiece:
            joins[number], joinable[number] = text[0] != " ", True
        else:  # a space begins a word, and so does what is no letter or digit, or follows such
            joins[number], joinable[number] = _is_in_words(text[0]), _is_in_words(text[-1])
    return joins, joinable


def ends_sentence(tokenizer, vocab_size):
    """(vocab_size,) bool, whether an id is or ends in a full stop, an exclamation or question mark, or a line break."""
    ends = np.zeros(vocab_size, dtype=bool)
    for number, text in _texts(tokenizer, vocab_size):
        ends[number] = text.rstrip(" ").endswith(_SENTENCE_ENDS)
    return ends


def _is_in_words(character):
    return character.isalnum() or character == "\ufffd"  # part of a letter's bytes


def _is_wordpiece(tokenizer):
    return "WordPiece" in repr(tokenizer.backend_tokenizer.decoder)


def _texts(tokenizer, vocab_size):
    """(id, text) of each token that is not special, a space before what begins a word."""
    special, is_wordpiece = set(special_ids(tokenizer)), _is_wordpiece(tokenizer)
    byte_level = decoders.ByteLevel() if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else None
    for token, number in tokenizer.get_vocab().items():
        if is_wordpiece:
            text = token[2:] if token.startswith("##") else " " + token
        else:
            text = byte_level.decode([token]) if byte_level else token.replace("▁", " ")
        if text and number < vocab_size and number not in special:
            yield number, text
