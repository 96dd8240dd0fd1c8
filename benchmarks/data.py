"""Preparing text and feeding rows: `python benchmarks/data.py [--text FILE_OR_FOLDER] [--tokenizer FOLDER]`.

Preparing: the same text and tokenizer by ours and by `datasets.map` with `tok(batch)`, both into an Arrow file, in
processes of their own, with their peak memory. Feeding: rows of 1024 tokens by the class that the trainer reads from,
made into inputs and labels, and by a plain numpy memmap, at random places.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hf_myllm.data import packing, readers, sampler, sources
from hf_myllm.data.corpus import TokenStream, load_tokens
from hf_myllm.tasks import CausalLM


def prepare_ours(text, tokenizer):
    from hf_myllm.data import tokenizer as tokenizers

    loaded = tokenizers.load(tokenizer)
    start = time.perf_counter()
    tokens, _, account = load_tokens(sources.file_source(text), loaded)
    return time.perf_counter() - start, len(tokens)


def prepare_by_map(text, tokenizer):
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    end, files = loaded.eos_token_id, sources.file_source(text).files
    start = time.perf_counter()
    rows = datasets.Dataset.from_generator(
        lambda: ({"text": Path(file).read_bytes().decode("utf-8-sig")} for file in files)
    )
    found = rows.map(
        lambda batch: {"input_ids": [[*ids, end] for ids in loaded(batch["text"])["input_ids"]]},
        batched=True,
        batch_size=10,  # documents are long
        remove_columns=["text"],
    )
    seconds = time.perf_counter() - start
    return seconds, sum(len(row) for row in found.data.column("input_ids").to_pylist())


def in_its_own_process(name, text, tokenizer):
    """Seconds, tokens and peak memory (bytes) of one way of preparing, with a cache of its own."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, __file__, "--one", name, "--text", text, "--tokenizer", tokenizer]
        environment = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def feed(rows_per_batch, batches, length=1024, count=200_000_000):
    """Tokens a second of the trainer's own route (order, rows, inputs and labels), and of a memmap."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.bin"
        np.random.default_rng(0).integers(0, 50_000, count, dtype=np.uint16).tofile(path)
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        int(ids.astype(np.uint32).sum())  # read once, so that both find it in memory
        rows = packing.StridedRows(TokenStream([ids], "", 50_000), length, length, "x")
        task, plan = CausalLM(max_len=length), sampler.Sampler(len(rows), rows_per_batch, 1)
        start = time.perf_counter()
        for step in range(batches):
            task.batch(rows, plan.rows_of_step(step), step, rows_per_batch)
        ours = time.perf_counter() - start
        draw = np.random.default_rng(1)
        start = time.perf_counter()
        for _ in range(batches):
            places = draw.integers(0, len(ids) - length - 1, rows_per_batch)
            windows = np.stack([ids[place : place + length + 1] for place in places]).astype(np.int64)
            windows[:, :-1], windows[:, 1:]
        plain = time.perf_counter() - start
    tokens = batches * rows_per_batch * length
    return tokens / ours, tokens / plain


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="{stdlib}/**/*.py")
    parser.add_argument("--tokenizer", help="a folder or a Hub id; default: one is trained on the text")
    parser.add_argument("--batches", type=int, default=500, help="of 32 rows, to feed")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--one", choices=("ours", "map"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        prepare = prepare_ours if arguments.one == "ours" else prepare_by_map
        seconds, tokens = prepare(arguments.text, arguments.tokenizer)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_memory": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.tokenizer:
            from hf_myllm.data import tokenizer as tokenizers

            tokenizers.train_bpe(readers.SourceTexts([sources.file_source(arguments.text)]), 4096).save_pretrained(
                folder
            )
        figures = {
            name: in_its_own_process(name, arguments.text, arguments.tokenizer or folder) for name in ("map", "ours")
        }
    for name, one in figures.items():
        one["tokens_per_second"] = one["tokens"] / one["seconds"]
        print(
            f"prepare, {name:<6}{one['tokens']:>14,} tokens{one['seconds']:9.1f} s"
            f"{one['tokens_per_second'] / 1e6:9.2f}M tokens/s, peak {one['peak_memory'] / 1e6:,.0f} MB"
        )
    assert figures["ours"]["tokens"] == figures["map"]["tokens"]
    figures["ratio"] = figures["ours"]["tokens_per_second"] / figures["map"]["tokens_per_second"]
    print(f"prepare, ours / map{figures['ratio']:14.2f}")
    ours, plain = feed(32, arguments.batches, count=min(200_000_000, arguments.batches * 400_000))
    figures["feed"] = {"ours": ours, "memmap": plain, "ratio": ours / plain}
    print(f"feed rows of 1024   ours {ours / 1e6:,.0f}M tokens/s, memmap {plain / 1e6:,.0f}M, ratio {ours / plain:.2f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
