"""Prepare the data of a recipe ahead of a launch; `python -m hf_myllm.prepare` is `hf-myllm prepare`."""

import sys

import datasets

from .build import build_config, build_task, default_max_len
from .build_data import find_sources, find_tokenizer, load_sets
from .distributed import silence_libraries
from .models import FAMILIES, loading
from .models.auto import num_positions
from .tasks import TASKS


def prepare_data(recipe):
    """Train the tokenizer of a recipe and tokenize its data into the cache."""
    recipe.check_family(FAMILIES).check_task(TASKS[recipe.task])
    silence_libraries()
    data, pretrained = recipe.data, None if recipe.run.init_from == "scratch" else recipe.run.init_from
    data_sources = find_sources(recipe)
    stored_config = loading.read_config(recipe.family, pretrained) if pretrained else None
    tokenizer = find_tokenizer(recipe, data_sources, pretrained, recipe.run.with_optimizer)
    task = build_task(recipe, data_sources, tokenizer, stored_config, False)
    config = build_config(recipe, tokenizer, pretrained, task)
    data.max_len = data.max_len or default_max_len(num_positions(config))
    task.configure(config, data.max_len)
    if data.streaming:
        data_sources.training = []  # a stream is tokenized while it is read
    training, validation, _ = load_sets(task, data_sources, True)
    unit = "rows" if task.is_labelled else "tokens"
    parts = {"training": training} | {name or "validation": part for name, part in validation.items()}
    for name, part in parts.items():
        if part is not None:
            task.make_rows(part, f"the {name} data", data.stride)
            print(f"{name:<12}{len(part):,} {unit} are prepared")
    print(f"{'cache':<12}{datasets.config.HF_DATASETS_CACHE}")


if __name__ == "__main__":
    from .cli import main

    main(["prepare", *sys.argv[1:]])
