"""The data section of a recipe: its sources, its tokenizer, and their tokens."""

import math
import os
from dataclasses import dataclass, replace

import numpy as np

from . import tasks
from .checkpoint import find_run_dir
from .data import cache, corpus, readers, sources, streaming
from .data import tokenizer as tokenizers
from .data.columns import check_template
from .data.discovery import TOKEN_ID_FORMATS
from .data.mixture import Mixture
from .data.packing import first_rows
from .data.remote import is_remote
from .errors import DataError, InputError, ModelError, RecipeError, printable
from .models import FAMILIES
from .models.auto import num_positions
from .recipe.data_section import check_set_name
from .reporting.metrics_log import read_run

_COLUMN_KEYS = ("text_column", "text_pair_column", "label_column", "target_column", "columns", "template")
_LONGEST_DEFAULT = 1 << 20  # a tokenizer without a limit has 10^30
DRY_RUN_CHARS = 4_000_000  # characters that a dry run reads of a large source


@dataclass
class Sources:
    """Where a run's data come from."""

    training: list  # empty if only evaluating on val_file
    validation: dict  # name -> validation source, "" if there is one; without, a part of the training data is held out
    names: tuple = ()  # of the training sources, each of which has a validation set

    @property
    def all(self):
        return [*self.training, *self.validation.values()]

    @property
    def in_memory(self):
        """Whether some of the data came from Python, so that no command line can repeat the run."""
        return any(source.format == "memory" for source in self.all)

    @property
    def name(self):
        return ", ".join(source.name for source in self.training)

    def val_name(self, name=""):
        """Return how messages refer to a validation set."""
        if name in self.validation:
            return self.validation[name].name
        return f"the validation part of {', '.join(source.name for source in self.val_sources(name))}"

    def val_sources(self, name=""):
        """Return the sources of a validation set: its own, or those of which a part is held out."""
        if name in self.validation:
            return [self.validation[name]]
        return [self.training[self.names.index(name)]] if name else self.training


def find_sources(recipe, train_data=None, eval_data=None):
    """Return the [`Sources`] of a recipe, or of data in memory in place of its files."""
    found, template = _find_sources(recipe, train_data, eval_data), recipe.data.template or {}
    is_text = isinstance(template, str) and not tasks.TASKS[recipe.task].is_labelled
    for text in [template] if isinstance(template, str) else template.values():
        check_template(text)
    if recipe.data.deduplicate:
        if token_ids := [source.name for source in found.training if source.format in TOKEN_ID_FORMATS]:
            raise DataError(f"deduplicate: {token_ids[0]} holds token ids, not documents; remove deduplicate")
        found.training = [replace(source, deduplicate=True) for source in found.training]
    sources.check_prepared(found.all, text_column=recipe.data.text_column, document=recipe.data.document)
    _limit_rows(recipe, found)
    if is_text:
        found.training = [sources.with_template(source, template) for source in found.training]
        found.validation = {name: sources.with_template(source, template) for name, source in found.validation.items()}
    return found


def _limit_rows(recipe, found):
    """Set `max_rows` of the sources by `max_train_rows` and `max_eval_rows`; see [`sources.Source`].

    Of labelled data it counts the rows of the file with those that are held out. With it, data of the Hub are read over
    the network as far as needed, and so is a stream, which is then kept on the disk.
    """
    data, is_labelled = recipe.data, tasks.TASKS[recipe.task].is_labelled
    if limit := data.max_eval_rows:
        found.validation = {name: replace(source, max_rows=limit) for name, source in found.validation.items()}
    if not data.max_train_rows or not found.training:
        return
    weights = [source.get("weight", 1.0) for source in data.datasets or [{}]]
    data.streaming, total = False, sum(weights)
    for index, (source, weight) in enumerate(zip(found.training, weights, strict=True)):
        count = max(1, math.ceil(data.max_train_rows * weight / total))
        if is_labelled and not found.validation and data.val_fraction:
            held_out = data.max_eval_rows or max(1, round(count * data.val_fraction / (1 - data.val_fraction)))
            count += held_out
        source = replace(source, max_rows=count, max_chars=0)
        found.training[index] = replace(source, is_streamed=True) if source.format == "hub" else source


def _find_sources(recipe, train_data, eval_data):
    data = recipe.data
    options = data.text_column or "text", data.document
    if eval_data is not None:
        named = eval_data if isinstance(eval_data, dict) else {"": eval_data}
        names = {name: f"eval_data[{name!r}]" if name else "eval_data" for name in named}
        for name in filter(None, named):
            check_set_name(names[name], name)
        validation = {name: sources.in_memory_source(part, names[name], *options) for name, part in named.items()}
    else:
        named = data.val_file if isinstance(data.val_file, dict) else {"": data.val_file} if data.val_file else {}
        validation = {name: sources.file_source(files, *options) for name, files in named.items()}
    entries, names = data.datasets or [data.model_dump()], ()
    if data.datasets and data.datasets[0].get("name") and not validation:
        names = tuple(entry["name"] for entry in entries)
        own = {entry["name"]: entry | {"train_file": entry["val_file"], "dataset": None} for entry in entries
               if entry.get("val_file")}  # fmt: skip
        validation = {name: find_source(entry, data) for name, entry in own.items()}
    if recipe.evaluation.eval_only and validation and set(names) <= set(validation):
        return Sources([], validation)
    if train_data is not None:
        training = [sources.in_memory_source(train_data, "train_data", *options)]
    else:
        training = [find_source(entry, data) for entry in entries]
    if data.streaming:  # remote files are not downloaded, not even to train a tokenizer
        training = [replace(source, is_streamed=any(map(is_remote, source.files))) for source in training]
    for source in validation.values():
        sources.check_disjoint(training, source)
    is_sampled = recipe.run.dry_run and train_data is None and not (data.streaming or data.max_train_rows)
    if is_sampled and not tasks.TASKS[recipe.task].is_labelled:
        training = [first_part(source) for source in training]
        validation = {name: first_part(source) for name, source in validation.items()}
    return Sources(training, validation, names)


def find_source(entry, data):
    """Return the source that an entry of `datasets` names; keys that it lacks are those of the section `data`."""
    column = entry.get("text_column", data.text_column) or "text"
    if entry.get("dataset"):
        split = entry.get("dataset_split", data.dataset_split)
        hub_options = entry.get("dataset_config"), split, entry.get("dataset_revision"), column
        return sources.hub_source(entry["dataset"], *hub_options)
    return sources.file_source(entry["train_file"], column, entry.get("document", data.document))


def first_part(source):
    """Return the source as a dry run reads it: only its beginning if it is large."""
    if source.format == "hub":
        return replace(source, max_chars=DRY_RUN_CHARS, is_streamed=True)
    part = replace(source, max_chars=DRY_RUN_CHARS)
    size = 0 if source.format in TOKEN_ID_FORMATS else sources.total_size(part)
    limit = DRY_RUN_CHARS / 200 if source.format in ("parquet", "memory") else 5 * DRY_RUN_CHARS  # rows or bytes
    return part if size is None or size > limit else source


def load_data(recipe, data_sources, task, trainer_state, vocab_size, cleanup, show_progress):
    """Tokenize the data, or open it in the cache.

    Args:
        trainer_state: of the checkpoint that the run resumes from, or None.
        vocab_size: of the model; the token ids are checked against it.
        cleanup: an ExitStack, which closes the stream of a streaming run.
    Returns:
        training data (None without), a dict of validation data by name, and their statistics.
    """
    data = recipe.data
    if data.streaming and not recipe.evaluation.eval_only:
        training, validation, stats = open_stream(recipe, data_sources, task, trainer_state, show_progress)
        cleanup.callback(training.close)
    else:
        training, validation, stats = load_sets(task, data_sources, show_progress)
    for name, value in task.resolved_settings.items():
        setattr(data, name, value)
    parts = {data_sources.name: training} | {data_sources.val_name(name): part for name, part in validation.items()}
    for name, part in parts.items():
        check_token_ids(tokens_of(task, part), vocab_size, name)
    return training, validation, stats


def tokens_of(task, part):
    """Return the token stream of training or validation data as `task.load` returns it; None without data."""
    return part.tokens if task.is_labelled and part is not None else part


def load_sets(task, data_sources, show_progress):
    """Return the training data, a dict of the validation data by name, and their statistics; see [`Task.load`].

    Raises:
        DataError: validation data holds the same tokens as the training data.
    """
    if data_sources.training and set(data_sources.names) - set(data_sources.validation):
        training, validation, stats = _load_named(task, data_sources, show_progress)
    else:
        (name, source), *others = [*data_sources.validation.items()] or [("", None)]
        training, first, stats = task.load(data_sources.training, source, show_progress)
        validation = {} if first is None else {name: first}
        for name, source in others:
            _, validation[name], more = task.load([], source, show_progress)
            stats |= {f"validation {name}": more["validation"]} if "validation" in more else {}
    if data_sources.validation and training is not None:
        stats["shared"] = find_shared(task, data_sources, training, validation)
    return training, validation, stats


def find_shared(task, data_sources, training, validation):
    """Return (documents that are training documents too, all documents) of each validation set, by name.

    Raises:
        DataError: all of a file's are: its loss would not say what the model does with other text. Labelled texts may
            be short, and equal by chance.
    """
    shared, train_tokens = {}, tokens_of(task, training)
    for name, source in data_sources.validation.items():
        part = validation[name]
        tokens = tokens_of(task, part)
        count, total = corpus.count_shared(train_tokens, tokens)
        is_same = tokens.fingerprint == train_tokens.fingerprint
        is_part = count == total > 0 and not task.is_labelled and (source.files or source.format == "shards")
        if is_same or is_part:
            raise DataError(
                f"{data_sources.val_name(name)}: it holds the same tokens as {'' if is_same else 'a part of '}"
                f"{data_sources.name}; give others, or leave it out to hold out a part"
            )
        shared[name] = count, total
    return shared


def _load_named(task, data_sources, show_progress):
    """See [`load_sets`]; each source has a validation set of its own, some of which are held out."""
    sets = zip(data_sources.names, data_sources.training, strict=True)
    loaded = {name: task.load([source], data_sources.validation.get(name), show_progress) for name, source in sets}
    stats = corpus.merge_stats([own for _, _, own in loaded.values()])
    stats |= {f"validation {name}": own["validation"] for name, (_, _, own) in loaded.items() if "validation" in own}
    validation = {name: part for name, (_, part, _) in loaded.items() if part is not None}
    return corpus.concatenate([training for training, _, _ in loaded.values()]), validation, stats


def make_rows(recipe, data_sources, task, training, validation):
    """Return the training rows (None without), and a dict of the validation rows, of what [`load_data`] returned."""
    train_rows, limits = None, (recipe.data.max_train_rows, recipe.data.max_eval_rows)
    if training is not None:
        train_rows = task.make_rows(training, data_sources.name, recipe.data.stride)
    # without overlap: each token counts once
    val_sets = {name: task.make_rows(part, data_sources.val_name(name)) for name, part in validation.items()}
    if not task.is_labelled:
        train_rows = first_rows(train_rows, limits[0]) if limits[0] and train_rows is not None else train_rows
        val_sets = {name: first_rows(rows, limits[1]) if limits[1] else rows for name, rows in val_sets.items()}
    return train_rows, val_sets


def open_stream(recipe, data_sources, task, trainer_state, is_maker):
    """Return what `task.load` does, of a corpus that is tokenized a window at a time."""
    data, training = recipe.data, data_sources.training
    positions = trainer_state.get("stream") if trainer_state else None
    if token_ids := [source.name for source in training if source.format in ("bin", "pkl")]:
        raise DataError(f"streaming: {token_ids[0]} holds token ids, which are memory-mapped; leave streaming out")
    validation = {name: task.load([], source, is_maker)[1] for name, source in data_sources.validation.items()}
    size = min(data.streaming_window, 1_000_000) if recipe.run.dry_run else data.streaming_window
    owner, streams = os.path.abspath(recipe.run.save_model), []
    for index, own in enumerate(streaming.stored_positions(positions, len(training))):
        source = replace(training[index], is_streamed=True)
        own_owner = f"{owner} {index}" if index else owner  # a source may be named twice
        streams.append(streaming.TokenWindows(source, task.tokenizer, size, own_owner, own, is_maker))
    whole = streaming.Streams(streams)
    if positions and trainer_state["data"].get("training data") != whole.fingerprint:
        for stream in streams:
            stream.positions = {0: {}}  # those in the checkpoint are of another corpus
    return whole, validation, {"train": {}}


def plan_mixture(recipe, data_sources, rows, stats):
    """Return the [`Mixture`] of several sources, or of one with a limit; None of a single one.

    Raises:
        InputError: a source is too small for one row, or no source is left for a stage.
    """
    data, batch = recipe.data, recipe.training.total_batch_size
    names = [source.name for source in data_sources.training]
    limits = [source.get("max_epochs") for source in data.datasets or ()]
    if len(rows.source_starts) < 2 and not any(limits):
        return None
    sizes = np.diff([*rows.source_starts, len(rows)]).tolist()
    if data.streaming:
        sizes = [rows.num_rows] * len(names)
    if 0 in sizes:
        raise InputError(f"{names[sizes.index(0)]}: too small for one row; give more of it, or leave it out")
    unit = np.ones(len(sizes))
    if data.weights_by == "tokens":
        if data.packing not in ("pad", "best_fit"):
            raise RecipeError(
                f"weights_by: with packing {data.packing} all rows have {data.max_len} tokens, so that shares of rows "
                "are shares of tokens; remove it"
            )
        unit = np.diff([*rows.tokens.source_starts, len(rows.tokens)]) / sizes  # tokens per row of each source
    stages = [(step * batch, (np.array(weights) / unit).tolist()) for step, weights in data.weight_stages()]
    shares = stats.get("shares", [1.0] * len(sizes))  # of each source that a dry run has read
    limits = [
        limit and max(1, int(limit * size / max(1e-9, share)))
        for limit, size, share in zip(limits, sizes, shares, strict=True)
    ]
    try:
        return Mixture(list(zip(rows.source_starts, sizes, strict=True)), stages, limits)
    except ValueError as error:
        first, following = (position // batch for position in error.args)
        raise InputError(
            f"max_epochs: all sources with a weight are used up at step {first}, before the next stage of "
            f"mixture_schedule at step {following}; raise max_epochs, or begin that stage by step {first}"
        ) from None


def check_token_ids(tokens, vocab_size, name):
    """Raise DataError if some token id is beyond the model's vocabulary."""
    if tokens is None or tokens.max_id < vocab_size:
        return
    if (position := tokens.find_out_of_vocabulary(vocab_size)) is not None:
        raise DataError(
            f"{name}: token id {int(tokens.read(position, 1)[0])} at position {position} (the largest is "
            f"{tokens.max_id}), but the model's vocabulary has {vocab_size} tokens; raise vocab_size, or give the "
            "data's own tokenizer"
        )


def keeps_old_split(recipe):
    """Return whether a run that is resumed or evaluated began with version 0.1, which held out evenly spaced items.

    It keeps them: of those that would be held out now, it has learned most.
    """
    facts = read_run(find_run_dir(recipe.run.save_model if recipe.run.resume else recipe.run.init_from))
    return bool(facts) and facts.get("held_out_by") != "hash"


def default_max_len(config, tokenizer):
    """Return the tokens per row of a recipe that leaves them open: the model's positions. Of a model without a limit,
    the length it was trained with, by its configuration (T5's n_positions) or its tokenizer."""
    own = getattr(config, "n_positions", None), getattr(tokenizer, "model_max_length", None)
    length = num_positions(config) or next((size for size in own if size and size <= _LONGEST_DEFAULT), None)
    if length is None:
        raise RecipeError("max_len: this model has no number of positions to take it from; give --max_len N")
    return length


# ---- the tokenizer


def check_tokenizer(recipe, config, tokenizer, task):
    """Check the prompt of samples, and limit the tokenizer to the model's positions, where stock pipelines truncate."""
    if tokenizer is None:
        return
    positions = num_positions(config) or math.inf
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    if recipe.evaluation.start_context is not None:
        task.check_prompt(recipe.evaluation.start_context, positions)


def find_tokenizer(recipe, data_sources, pretrained, keep):
    """Return the tokenizer of a recipe with its `add_tokens`: loaded, trained, or that of the pretrained model.

    Args:
        data_sources: the [`Sources`], on which a tokenizer may be trained.
        pretrained: folder or Hub id of the model that the run starts from, or None.
        keep: whether the model's own tokenizer takes precedence: when training continues or is evaluated.
    Returns:
        None for token ids without a tokenizer.
    """
    tokenizer, new_tokens = _find_tokenizer(recipe, data_sources, pretrained, keep), recipe.data.add_tokens or []
    if new_tokens and tokenizer is None:
        raise ModelError("add_tokens: there is no tokenizer to add them to; give --tokenizer")
    if new_tokens and not keep:
        tokenizer.add_tokens(new_tokens)
    elif unknown := [token for token in new_tokens if token not in tokenizer.get_vocab()]:
        raise ModelError(
            f"add_tokens: {pretrained} was trained without {unknown[0]!r}; start a new run from it, with --init_from "
            f"{pretrained} --save_model FOLDER"
        )
    for source in data_sources.all:
        if source.format == "shards" and tokenizers.fingerprint(tokenizer) != source.data.content["tokenizer"]:
            raise _other_tokenizer(source)
    return tokenizer


def _other_tokenizer(source):
    return ModelError(
        f"tokenizer: the tokens of {source.name} are of another one; leave tokenizer and add_tokens out, to take the "
        "index's own, or prepare the text with this one"
    )


def _find_tokenizer(recipe, data_sources, pretrained, keep):
    data, family = recipe.data, FAMILIES[recipe.family]
    reads_text = any(source.format not in TOKEN_ID_FORMATS for source in data_sources.all)
    indexed = [source for source in data_sources.all if source.format == "shards"]
    if pretrained and (keep or not data.tokenizer):
        try:
            return tokenizers.load(str(pretrained), family.config.model_type)
        except InputError:
            # A model that was trained on token ids may have none. A tokenizer trained on other text has other ids.
            if tokenizers.has_files(pretrained) or (reads_text and not isinstance(data.tokenizer, str)):
                raise
    if isinstance(data.tokenizer, str):
        try:
            return tokenizers.load(data.tokenizer)
        except InputError as error:
            if not any(source.format == "hub" for source in data_sources.training):
                raise
            raise ModelError(f"{error}; without the Hub, give --train_file FILE in place of the dataset") from None
    if indexed and data.tokenizer in (None, indexed[0].data.content.get("tokenizer_recipe")):
        return tokenizers.load(str(indexed[0].data.tokenizer_folder()))
    if isinstance(data.tokenizer, dict):
        if indexed:
            raise _other_tokenizer(indexed[0])
        return _train_tokenizer(recipe, data_sources.training or [*data_sources.validation.values()])
    if reads_text:
        trained = f"{{train: {family.tokenizer}, vocab_size: 8192}}"
        raise ModelError(f"tokenizer: text needs one; give --tokenizer a folder, a Hub id, or '{trained}'")
    return None


def _train_tokenizer(recipe, texts_from):
    """Train a tokenizer on the text of some sources, or load it from the cache."""
    data, algorithm, vocab_size = recipe.data, recipe.data.tokenizer["train"], recipe.data.tokenizer.get("vocab_size")
    texts_from = [replace(source, max_rows=0) for source in texts_from]  # a trial has the tokenizer of the whole run
    new_tokens = tasks.TASKS[recipe.task].new_tokens
    texts, task_key = readers.SourceTexts(texts_from), [new_tokens] if new_tokens else []
    if tasks.TASKS[recipe.task].is_labelled:
        columns = {name: value for name in _COLUMN_KEYS if (value := getattr(data, name)) or name in _COLUMN_KEYS[:3]}
        texts, task_key = tasks.LabelledTexts(texts_from, recipe.task, **columns), [*task_key, recipe.task, columns]

    def train(folder):
        if recipe.run.log_level in ("debug", "info"):
            text = ", ".join(source.name for source in texts_from)
            size = f" with {vocab_size:,} tokens" if vocab_size else ""
            print(f"tokenizer   training {algorithm}{size} on {printable(text)}", flush=True)
        tokenizers.save(tokenizers.train(algorithm, texts, vocab_size, new_tokens), folder)

    whole = [sources.known_whole(source) or source for source in texts_from]
    key = [algorithm, vocab_size, *task_key, *map(sources.source_key, whole)]
    if not cache.cached_path(key).exists():  # a dry run of large text trains one on its beginning
        key = [algorithm, vocab_size, *task_key, *map(sources.source_key, texts_from)]
    tokenizer = tokenizers.load(str(cache.cached_folder(key, train)))
    tokenizer.name_or_path = f"{{train: {algorithm}}}"  # in messages, not a folder of the cache
    return tokenizer
