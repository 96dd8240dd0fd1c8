"""Prepare the data of a recipe ahead of a launch; `python -m hf_myllm.prepare` is `hf-myllm prepare`.

Without more, the tokenizer is trained and the text tokenized into the cache. With `--to`, the tokens are written as
token shards (data/shards.py), which any machine reads; `--part 1/2` writes a part of them.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import datasets

from .build import build_config, build_task
from .build_data import default_max_len, find_sources, find_tokenizer, load_sets
from .data import shards, tokenization
from .data import tokenizer as tokenizers
from .data.cache import key_digest
from .data.discovery import TOKEN_ID_FORMATS
from .data.remote import is_remote, without_file_scheme
from .data.sources import source_key
from .distributed import silence_libraries
from .errors import DataError
from .files import PARTIAL
from .models import FAMILIES, loading, revisions
from .tasks import TASKS
from .terminal import plural


def prepare_data(recipe, to=None, part=(1, 1)):
    """Train the tokenizer of a recipe and tokenize its data.

    Args:
        to: folder or URL to write token shards to, instead of the cache.
        part: (number from 1, count) of the shards to write.
    """
    recipe.check_family(FAMILIES)
    recipe.check_task(TASKS[recipe.task], FAMILIES[recipe.family].takes_positions(recipe.task))
    silence_libraries()
    data, init_from = recipe.data, recipe.run.init_from
    pretrained = None if init_from == "scratch" else revisions.resolve(init_from, with_weights=False)
    data_sources = find_sources(recipe)
    if to:
        to = without_file_scheme(to)
        _check_writable(recipe, data_sources, to)
    stored_config = loading.read_config(recipe.family, pretrained) if pretrained else None
    tokenizer = find_tokenizer(recipe, data_sources, pretrained, recipe.run.with_optimizer)
    task = build_task(recipe, data_sources, tokenizer, stored_config, False)
    if to:
        facts = {"tokenizer_recipe": data.tokenizer} if isinstance(data.tokenizer, dict) else {}
        val_fraction = 0.0 if data_sources.validation else data.val_fraction
        for path, source, key in _places(data_sources, to):
            write_source(source, tokenizer, val_fraction, path, part, facts, key)
        return
    config = build_config(recipe, tokenizer, pretrained, task)
    data.max_len = data.max_len or default_max_len(config, tokenizer)
    task.configure(config, data.max_len)
    if data.streaming:
        data_sources.training = []  # a stream is tokenized while it is read
    training, validation, _ = load_sets(task, data_sources, True)
    unit = "rows" if task.is_labelled else "tokens"
    parts = {"training": training} | {name or "validation": part for name, part in validation.items()}
    for name, rows in parts.items():
        if rows is not None:
            task.make_rows(rows, f"the {name} data", data.stride)
            print(f"{name:<12}{len(rows):,} {unit} are prepared")
    print(f"{'cache':<12}{datasets.config.HF_DATASETS_CACHE}")


def _check_writable(recipe, data_sources, to):
    """Raise DataError if these sources cannot be written as token shards to a folder or URL."""
    if TASKS[recipe.task].is_labelled:
        raise DataError(f"--to: it writes the tokens of texts, and task {recipe.task} has rows; leave it out")
    if recipe.data.max_train_rows or recipe.data.max_eval_rows:
        raise DataError("--to: it writes shards of all the text; remove max_train_rows and max_eval_rows")
    for path, source, _ in _places(data_sources, to):
        if source.format in TOKEN_ID_FORMATS:
            raise DataError(f"--to: {source.name} holds token ids already; give the text")
        is_inside = Path(os.path.realpath(to)).is_relative_to(os.path.realpath(source.name))
        if is_inside and os.path.isdir(source.name) and not is_remote(to):
            raise DataError(f"--to: {to} is in the folder of the text, {source.name}; name a folder elsewhere")
        folder = shards.Folder(path)
        if folder.is_local and not os.path.isdir(path):
            if os.path.lexists(path):
                raise DataError(f"--to: {path} is a file; name a folder")
            continue
        names = [name for name, size in folder.sizes([]).items() if size and not name.startswith(".")]
        names = sorted(name for name in names if not name.endswith((PARTIAL, ".log", ".out", ".err")))
        if names and not any(re.fullmatch(r"shard-[0-9]+\.(bin|documents)", name) for name in names):
            raise DataError(
                f"--to: {path} holds files of another origin ({names[0]}) and no token shards; name another folder"
            )


def _places(data_sources, to):
    """Return (folder or URL, source, key of a recipe) of each source: of a single training source the folder itself, of
    others one below it."""
    folder, training = to.rstrip("/"), data_sources.training
    places = [(f"{folder}/{number}", source, "train_file") for number, source in enumerate(training, start=1)]
    if len(training) == 1:
        places = [(folder, training[0], "train_file")]
    validation = data_sources.validation.items()
    return places + [(f"{folder}/validation-{name}".rstrip("-"), source, "val_file") for name, source in validation]


def write_source(source, tokenizer, val_fraction, path, part=(1, 1), facts=None, key="train_file"):
    """Write the token shards of a source or a part of them and, once all are there, the index.

    Args:
        facts: further content of the index.
        key: the key of a recipe that takes the index.
    """
    folder, content = shards.Folder(path), source_key(source)
    if "files" in content:  # which have other paths on other machines
        content["files"] = [digest for _, digest in content["files"]]
    digest = key_digest([content, *tokenization.text_key(tokenizer)])
    if folder.is_local:
        os.makedirs(path, exist_ok=True)
    entries, found = tokenization.write_shards(folder, source, tokenizer, True, digest, part)
    if missing := [number for number, entry in enumerate(entries) if entry is None]:
        others = ", ".join(sorted({f"{number % part[1] + 1}/{part[1]}" for number in missing}))
        print(f"{path}: {len(entries) - len(missing)} of {plural(len(entries), 'shard')} are there; missing: {others}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        tokenizers.save(tokenizer, temporary)
        names = sorted(os.listdir(temporary))
        for name in names:
            with open(os.path.join(temporary, name), "rb") as file:
                folder.write(f"{shards.TOKENIZER}/{name}", file.read())
    facts = found | (facts or {}) | {"key": digest, "source": describe_source(source, content)}
    facts["tokenizer_files"] = names
    index = tokenization.write_index(folder, tokenizer, entries, facts, val_fraction)
    print(f"{path}/{shards.INDEX}: {index['tokens']:,} tokens of {plural(index['documents'], 'document')} in "
          f"{plural(len(entries), 'shard')}; give it as {key}")  # fmt: skip


def describe_source(source, content):
    """Return what text an index came from, without the paths of this machine."""
    names = [os.path.basename(name.rstrip("/")) or name for name in source.name.split(" ")]
    facts = {"name": source.name if source.format == "hub" else " ".join(names), "format": source.format}
    facts |= {"files": len(source.files), "digest": key_digest(content)}
    for name in ("config", "split", "revision", "template", "text_column", "document", "deduplicate"):
        if (value := getattr(source, name)) and (source.format == "hub" or name not in ("config", "split")):
            facts[name] = value
    return facts


if __name__ == "__main__":
    from .cli import main

    main(["prepare", *sys.argv[1:]])
