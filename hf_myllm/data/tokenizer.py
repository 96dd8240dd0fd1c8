"""Load a tokenizer, train one on the recipe's text, and derive facts about its tokens."""

import ctypes
import hashlib
import json
import os
import re
import threading
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from ..errors import ModelError, first_line
from ..files import find_lfs_pointer
from ..models.revisions import resolve

END_OF_TEXT = "<|endoftext|>"
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEMPLATE_SECONDS = 10  # that a chat template may take for one chat
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
_FILES += ("spiece.model", "sentencepiece.bpe.model", "source.spm")  # of T5, XLM-RoBERTa, Marian
_SAMPLE = (
    "Hello, world! It's 1234 o'clock;\n\n  x_2 = y ... na\u0308ive caf\u00e9 \u4e2d\u6587 \U0001f600\tTHEY'LL go  99 "
)
_CHARACTER_WORDS = r"\s?\S+|\s"  # how a tokenizer of characters splits text
_SENTENCE_ENDS = tuple(".!?\u2026\u3002\uff01\uff1f\n")  # also the ellipsis and the full-width marks of East Asia


def load(name, model_type=None):
    """Load the tokenizer of a folder or of the Hugging Face Hub, as `id` or `id@revision`.

    Args:
        model_type: the model type, such as "bert", to assume for a folder that does not state it.
    Raises:
        ModelError: there is no such tokenizer, or it is not a fast one.
    """
    name = resolve(name, with_weights=False)
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception:
            if model_type is None:
                raise
            tokenizer = AutoTokenizer.from_pretrained(
                name, config=AutoConfig.for_model(model_type), trust_remote_code=False
            )
    except Exception as error:  # the library raises many classes of errors
        if pointer := find_lfs_pointer(name):
            raise ModelError(pointer) from None
        raise ModelError(
            f"tokenizer '{name}' cannot be found: it is not a folder with tokenizer files here, and the Hugging Face "
            f"Hub did not give it ({first_line(error)[:200]}); give a folder, a Hub id, or "
            "{train: bpe, vocab_size: 8192}"
        ) from None
    # A config.json alone gives a tokenizer without a vocabulary, which reads every text as unknown tokens.
    is_empty = (Path(name).is_dir() and not has_files(name)) or len(tokenizer) < 2
    if not tokenizer.is_fast or is_empty:
        raise ModelError(f"tokenizer '{name}' has no tokenizer.json or vocabulary that the tokenizers library reads")
    return as_trained(tokenizer, name)


def as_trained(tokenizer, folder):
    """Return the tokenizer that `AutoTokenizer` loaded; if the folder is of a run or its checkpoint and this one splits
    text in another way than the run's, that of the run."""
    if any((Path(folder) / parent / "recipe.yaml").is_file() for parent in (".", "..")):
        saved = PreTrainedTokenizerFast.from_pretrained(folder)
        if saved.encode(_SAMPLE, verbose=False) != tokenizer.encode(_SAMPLE, verbose=False):
            return saved
    return tokenizer


def has_files(folder):
    """Return whether a folder holds files of a tokenizer."""
    return any(path.name in _FILES for path in Path(folder).glob("*"))


def differs_when_loaded(tokenizer, folder):
    """Return whether `AutoTokenizer` splits text in another way once a tokenizer is saved in the folder of a model.

    The library replaces the splitting rules of the tokenizer's file by those of a class that it chooses.
    """
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return loaded.encode(_SAMPLE, verbose=False) != tokenizer.encode(_SAMPLE, verbose=False)


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016), of the class of GPT-2's; no text is unknown to it."""
    trained = _train_on_bytes(models.BPE(), trainers.BpeTrainer, texts, vocab_size)
    model = json.loads(trained.to_str())["model"]
    return GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def train_unigram(texts, vocab_size):
    """Train a byte-level unigram tokenizer (Kudo 2018); no text is unknown to it.

    The library sums in a different order each time, so two trainings differ slightly. A run keeps its tokenizer in the
    cache and in its folder.
    """
    trained = _train_on_bytes(models.Unigram(), trainers.UnigramTrainer, texts, vocab_size)
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _train_on_bytes(model, trainer_class, texts, vocab_size):
    trained = Tokenizer(model)
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainer_class(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return trained


def train_characters(texts, vocab_size=None):
    """Return a tokenizer whose tokens are the characters of some texts; others become the tokens of their UTF-8 bytes.

    Args:
        vocab_size: keep the most frequent characters; default: all.
    """
    counts = Counter()
    for text in texts:
        counts.update(text)
    tokens = [END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256))]
    kept = sorted(counts, key=lambda character: (-counts[character], character))
    tokens += sorted(kept if vocab_size is None else kept[: max(0, vocab_size - len(tokens))])
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    trained = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(_CHARACTER_WORDS), "isolated")  # words are cached
    trained.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def train_wordpiece(texts, vocab_size):
    """Train a cased WordPiece tokenizer (Wu et al. 2016) with BERT's special tokens and splitting, of BERT's class.

    Args:
        texts: an iterable that is read twice.
    """
    # The library's WordPiece trainer numbers characters in the order of a hash table, which differs between processes,
    # and breaks ties by number. So the characters are numbered here; the rest is the same as BPE.
    counts = Counter()
    for text in texts:
        counts.update(text)
    alphabet, max_size = [], (vocab_size - len(BERT_SPECIAL_TOKENS)) * 3 // 4
    for character, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        forms = [character] if _is_own_word(character) else [character, "##" + character]
        if not character.isspace() and len(alphabet) + len(forms) <= max_size:
            alphabet += forms
    first_forms = [form for form in alphabet if not form.startswith("##")]
    trained = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=False)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_SPECIAL_TOKENS, *sorted(alphabet)],
        initial_alphabet=first_forms,
        limit_alphabet=len(first_forms),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=False)


def _is_own_word(character):
    """Return whether BERT splits text before and after a character: punctuation and Chinese characters."""
    is_symbol = character.isascii() and not character.isalnum()
    return is_symbol or unicodedata.category(character).startswith("P") or "\u4e00" <= character <= "\u9fff"


def train(algorithm, texts, vocab_size, new_tokens):
    """Train a tokenizer of `vocab_size` tokens.

    Args:
        algorithm: a key of TRAINERS.
        vocab_size: None for all characters of the text.
        new_tokens: {attribute: special token or list of them} to add, where the algorithm has none of its own; with
            any, each text ends with the end token, as T5's and BART's do.
    Raises:
        ModelError: they leave too few tokens for the text.
    """
    num_new = sum(len(value) if isinstance(value, list) else 1 for value in new_tokens.values())
    smallest = num_new + (100 if algorithm == "wordpiece" else 257)
    if vocab_size is not None and vocab_size < smallest:
        raise ModelError(
            f"tokenizer: vocab_size {vocab_size} leaves too few tokens beside {num_new} special tokens of the task; "
            f"give at least {smallest}"
        )
    tokenizer = TRAINERS[algorithm](texts, vocab_size and vocab_size - num_new)
    if not new_tokens:
        return tokenizer
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    tokenizer.add_special_tokens({name: token for name, token in new_tokens.items() if not getattr(tokenizer, name)})
    if tokenizer.sep_token is not None:
        return tokenizer
    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    special = tokenizer.special_tokens_map | {"extra_special_tokens": tokenizer.extra_special_tokens}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # GPT-2's class would drop the end


TRAINERS = {
    "bpe": train_bpe,
    "unigram": train_unigram,
    "wordpiece": train_wordpiece,
    "characters": train_characters,
}


def save(tokenizer, folder):
    """Write a tokenizer's files, readable by transformers 4 and 5 and by llama.cpp.

    Raises:
        OSError: the files cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises a plain Exception
        raise OSError(first_line(error)) from None
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "auto_map"):  # how it was loaded here, and code of somebody else
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 4 does not have this class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if config.get("tokenizer_class") == "LlamaTokenizer":  # otherwise transformers 4 and llama.cpp add a BOS token
        ids = tokenizer("a")["input_ids"]
        config["add_bos_token"] = ids[0] == tokenizer.bos_token_id
        config["add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(tokenizer):
    """Return a digest of everything that decides how text becomes tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def end_of_document(tokenizer):
    """Return the ids that close each document: end of text, or BERT's [SEP] and the [CLS] that opens the next one."""
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    if tokenizer.sep_token_id is not None:
        return [token_id for token_id in (tokenizer.sep_token_id, tokenizer.cls_token_id) if token_id is not None]
    raise ModelError(
        f"the tokenizer {tokenizer.name_or_path} has no end-of-text token to put between documents; "
        "set eos_token in its tokenizer_config.json"
    )


def special_affixes(tokenizer):
    """Return the ids that stand before and after each text of an encoder-decoder; the end of text is one of these."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    inner = [index for index, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
    before, after = encoding.ids[: inner[0]], encoding.ids[inner[-1] + 1 :]
    return before, after if tokenizer.eos_token_id in after else [*after, tokenizer.eos_token_id]


def render_chat(tokenizer, messages, **options):
    """Return a chat in the form of the tokenizer's template, which is a program of somebody else.

    Args:
        options: of the tokenizer's `apply_chat_template`.
    Raises:
        ModelError: the template does not end within `TEMPLATE_SECONDS`.
        ValueError: the template refuses the chat.
    """
    try:
        with _time_limit(TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TimeoutError:
        raise ModelError(f"the chat template does not end within {TEMPLATE_SECONDS:g} seconds; give another") from None
    except (Exception, MemoryError) as error:
        raise ValueError(f"the chat template refuses it: {first_line(error)[:300]}") from None


class _TimeLimit:
    """Raises TimeoutError in blocks of Python code that take too much CPU time; works in any thread.

    One thread watches all blocks, because starting one takes longer than rendering a chat. It ends when no block is
    left.
    """

    def __init__(self):
        self.lock, self.ends, self.watcher = threading.Lock(), {}, None

    @contextmanager
    def __call__(self, seconds):
        thread = threading.get_ident()
        with self.lock:
            self.ends[thread] = time.process_time() + seconds
            if self.watcher is None:
                self.watcher = threading.Thread(target=self._watch, daemon=True)
                self.watcher.start()
        try:
            yield
        finally:
            with self.lock:
                self.ends.pop(thread, None)

    def _watch(self):
        while True:
            time.sleep(0.1)
            with self.lock:
                late = [thread for thread, end in self.ends.items() if time.process_time() > end]
                for thread in late:
                    del self.ends[thread]
                    error = ctypes.py_object(TimeoutError)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)
                if not self.ends:
                    self.watcher = None
                    return


_time_limit = _TimeLimit()
if hasattr(os, "register_at_fork"):  # a forked process has no copy of the watcher
    os.register_at_fork(after_in_child=_time_limit.__init__)


def safe_split_pattern(tokenizer):
    """Return a pattern that matches where text can be split without changing its tokens.

    The match itself, white space that gives no token, belongs to neither part. None if no such pattern is known.
    """
    added = tokenizer.added_tokens_decoder.values()
    if any(token.rstrip or any(character.isspace() for character in token.content) for token in added):
        return None  # such a token may extend across the split
    # added tokens are matched before the text is split into words, so the space before one is not part of it
    word = f"(?!{'|'.join(re.escape(token.content) for token in added) or '(?!)'})\\S"
    backend = tokenizer.backend_tokenizer
    normalizer, splitter = repr(backend.normalizer), repr(backend.pre_tokenizer)
    if splitter.startswith("ByteLevel(add_prefix_space=False") and "use_regex=True" in splitter:
        # GPT-2's pattern never joins a line break or a space before a word to the text before it
        return re.compile(rf"(?=\n{word})|(?<=\S)(?= {word})") if normalizer == "None" else None
    if splitter.startswith(f'Split(pattern=Regex("{_CHARACTER_WORDS}")') and normalizer == "None":
        return re.compile(r"(?<=\S)(?=\s)")
    if splitter.startswith("BertPreTokenizer"):
        return re.compile(r"[ \t\r\n]+")
    if splitter.startswith("Sequence(pretokenizers=[WhitespaceSplit(), Metaspace("):
        return re.compile(rf"[ \t\r\n]+(?=\w)(?={word})")
    is_llama = re.match(r'Metaspace\(replacement="▁", prepend_scheme=(first|always), split=False', splitter)
    if is_llama and normalizer == "None" and not any(re.search("[^▁]▁", token) for token in tokenizer.get_vocab()):
        # no token has a space inside, and the tokenizer adds the space before the second part that the split removes
        return re.compile(rf"(?<=[^\s▁]) (?!▁)(?={word})")
    return None


def token_bytes(tokenizer, vocab_size):
    """Return how many bytes of text each token stands for, 0 for special tokens: (vocab_size,) int64.

    Losses per byte are comparable across tokenizers, losses per token are not. None for WordPiece, which drops spaces,
    so its tokens do not add up to the text. For a tokenizer that normalizes text, as T5's, normalized text is counted.
    """
    if _is_wordpiece(tokenizer):
        return None
    counts, is_byte_level = np.zeros(vocab_size, dtype=np.int64), _is_byte_level(tokenizer)
    for token, token_id in _ordinary_tokens(tokenizer, vocab_size):
        if is_byte_level:
            counts[token_id] = len(token)  # one character per byte
        elif len(token) == 6 and token.startswith("<0x"):
            counts[token_id] = 1  # SentencePiece's byte fallback
        else:
            counts[token_id] = len(token.replace("▁", " ").encode())
    return counts


def continues_word(tokenizer, vocab_size):
    """Return which tokens continue the word of the token before them.

    Returns:
        joins: (vocab_size,) bool, whether a token continues a word if the token before it is joinable.
        joinable: (vocab_size,) bool, whether a token's word can be continued.
    """
    joins, joinable = np.zeros(vocab_size, dtype=bool), np.zeros(vocab_size, dtype=bool)
    is_wordpiece = _is_wordpiece(tokenizer)
    for token_id, text in _token_texts(tokenizer, vocab_size):
        if is_wordpiece:
            joins[token_id], joinable[token_id] = text[0] != " ", True
        else:  # a word ends at a space and at any character that is not a letter or digit
            joins[token_id], joinable[token_id] = _is_word_character(text[0]), _is_word_character(text[-1])
    return joins, joinable


def ends_sentence(tokenizer, vocab_size):
    """Return which tokens end with a full stop, exclamation mark, question mark or line break: (vocab_size,) bool."""
    ends = np.zeros(vocab_size, dtype=bool)
    for token_id, text in _token_texts(tokenizer, vocab_size):
        ends[token_id] = text.rstrip(" ").endswith(_SENTENCE_ENDS)
    return ends


def _is_word_character(character):
    return character.isalnum() or character == "\ufffd"  # a part of a letter's bytes


def _is_wordpiece(tokenizer):
    return "WordPiece" in repr(tokenizer.backend_tokenizer.decoder)


def _is_byte_level(tokenizer):
    return "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)


def _ordinary_tokens(tokenizer, vocab_size):
    """Yield (token, id) of each token that is not special and below vocab_size."""
    special = set(tokenizer.all_special_ids)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id < vocab_size and token_id not in special:
            yield token, token_id


def _token_texts(tokenizer, vocab_size):
    """Yield (id, text) of each ordinary token, with a space before a token that begins a word."""
    is_wordpiece, byte_level = _is_wordpiece(tokenizer), decoders.ByteLevel() if _is_byte_level(tokenizer) else None
    for token, token_id in _ordinary_tokens(tokenizer, vocab_size):
        if is_wordpiece:
            text = token[2:] if token.startswith("##") else " " + token
        else:
            text = byte_level.decode([token]) if byte_level else token.replace("▁", " ")
        if text:
            yield token_id, text
