"""Measure tokenization and row reading: `python benchmarks/data.py [--text FILE_OR_FOLDER] [--tokenizer FOLDER]`.

`--shards`: token shards instead. CPU time and peak memory of `hf-myllm prepare --to` on the text, and of the first rows
at row 10^9 of a simulated index of 10^12 tokens, whose files are sparse.

Tokenization: tokens per second and peak memory of `load_tokens` and of `datasets.map`, with the same text and
tokenizer, both into files, each in its own process. Row reading: tokens per second of the trainer's rows of
1024 tokens, with inputs and labels, and of windows at random positions of a numpy memmap.
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

import datasets
import numpy as np
from transformers import AutoTokenizer

from hf_myllm.data import packing, readers, sampler, shards, sources
from hf_myllm.data import tokenizer as tokenizers
from hf_myllm.data.corpus import TokenStream, load_tokens
from hf_myllm.tasks import CausalLM


def tokenize_ours(text, folder):
    """Return the seconds and the number of tokens of `load_tokens`."""
    tokenizer = tokenizers.load(folder)
    start = time.perf_counter()
    tokens, _, _ = load_tokens(sources.file_source(text), tokenizer)
    return time.perf_counter() - start, len(tokens)


def tokenize_with_map(text, folder):
    """Return the seconds and the number of tokens of `datasets.map`."""
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, files = tokenizer.eos_token_id, sources.file_source(text).files
    start = time.perf_counter()
    documents = datasets.Dataset.from_generator(
        lambda: ({"text": Path(file).read_bytes().decode("utf-8-sig")} for file in files)
    )
    tokenized = documents.map(
        lambda batch: {"input_ids": [[*ids, end] for ids in tokenizer(batch["text"])["input_ids"]]},
        batched=True,
        batch_size=10,  # documents are long
        remove_columns=["text"],
    )
    seconds = time.perf_counter() - start
    return seconds, sum(len(row) for row in tokenized.data.column("input_ids").to_pylist())


def run_in_process(name, text, folder):
    """Return the seconds, tokens and peak memory (bytes) of a way to tokenize, in a new process with an empty cache."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, __file__, "--only", name, "--text", text, "--tokenizer", folder]
        environment = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure_reading(batch_size, num_batches, length=1024, num_tokens=200_000_000):
    """Return the tokens per second of the trainer's path (sampler, rows, inputs and labels) and of a memmap."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.bin"
        np.random.default_rng(0).integers(0, 50_000, num_tokens, dtype=np.uint16).tofile(path)
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        int(ids.astype(np.uint32).sum())  # read the file once, so that both find it in the page cache
        rows = packing.StridedRows(TokenStream([ids], "", 50_000), length, length, "x")
        task, row_sampler = CausalLM(max_len=length), sampler.Sampler(len(rows), batch_size, 1)
        start = time.perf_counter()
        for step in range(num_batches):
            task.batch(rows, row_sampler.rows_of_step(step), step, batch_size)
        ours = time.perf_counter() - start
        draw = np.random.default_rng(1)
        start = time.perf_counter()
        for _ in range(num_batches):
            positions = draw.integers(0, len(ids) - length - 1, batch_size)
            windows = np.stack([ids[position : position + length + 1] for position in positions]).astype(np.int64)
            windows[:, :-1], windows[:, 1:]
        memmap = time.perf_counter() - start
    total = num_batches * batch_size * length
    return total / ours, total / memmap


def prepare_shards(text, tokenizer):
    """Print the tokens, CPU seconds and peak memory of `hf-myllm prepare --to`."""
    with tempfile.TemporaryDirectory() as home:
        flags = ["--train_file", text, "--tokenizer", tokenizer, "--max_len", "1024", "--to", f"{home}/tokens"]
        environment = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([sys.executable, "-m", "hf_myllm.prepare", *flags], env=environment, check=True)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        tokens = json.loads(Path(home, "tokens", "index.json").read_text())["tokens"]
    seconds = usage.ru_utime + usage.ru_stime
    print(f"prepare --to: {tokens:,} tokens, {seconds:,.0f} s of CPU time, {tokens / seconds / 1e6:.2f}M tokens/s "
          f"of one core, peak {usage.ru_maxrss / 1024:,.0f} MB")  # fmt: skip


def simulate_index(folder, num_shards=31_250, tokens=32_000_000, documents=32_000):
    """Write an index of 10^12 tokens: sparse files of tokens, and one file of documents under many names."""
    records = np.zeros(documents, shards.RECORD)
    records["tokens"], records["bytes"] = tokens // documents, 4 * tokens // documents
    records["hash"] = np.random.default_rng(0).integers(0, 1 << 64, documents, dtype=np.uint64)
    Path(folder, "documents").write_bytes(records.tobytes())
    entry = {"documents": documents, "tokens": tokens, "bytes": 4 * tokens, "unknown": 0, "max_id": 50_256}
    entry |= {"records": documents, "continues": False, "header": 0, "digest": "0" * 64, "documents_digest": "0" * 64}
    entries = [{"name": f"shard-{number:05}"} | entry for number in range(num_shards)]
    for shard in entries:
        with open(Path(folder, f"{shard['name']}.bin"), "wb") as file:
            file.truncate(2 * tokens)
        os.link(Path(folder, "documents"), Path(folder, f"{shard['name']}.documents"))
    is_held_out = records["hash"] < np.uint64(int(0.05 * (1 << 64)))
    count = [int(is_held_out.sum()), *(int(records[name][is_held_out].sum()) for name in shards.COUNTS[1:])]
    held_out = {"val_fraction": 0.05, "counts": [count] * num_shards}
    index = {"format": shards.FORMAT, "version": shards.VERSION, "dtype": "uint16", "share": 1.0, "repeated": 0}
    Path(folder, shards.INDEX).write_text(json.dumps(index | {"shards": entries, "held_out": held_out}))


def start_in_index(folder, val_fraction, batch_size=32):
    """Return the seconds and the added peak memory (bytes) of opening an index and reading a batch at row 10^9."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    tokens, _, _ = load_tokens(sources.file_source(f"{folder}/index.json"), None, val_fraction)
    rows = packing.StridedRows(tokens, 1024, 1024, "x")
    opened, row_sampler = time.process_time(), sampler.Sampler(len(rows), batch_size, 1)
    for step in (10**9 // batch_size, 10**9 // batch_size + 1):
        rows.read(row_sampler.rows_of_step(step))
    read = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"tokens": len(tokens), "open": opened - start, "read": read - opened, "memory": 1024 * peak}


def measure_shards(text, tokenizer):
    prepare_shards(text, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        simulate_index(folder)
        for val_fraction in (0.0, 0.05):
            command = [
                sys.executable,
                __file__,
                "--text",
                folder,
                "--only",
                "start",
                "--val_fraction",
                str(val_fraction),
            ]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result = json.loads(output.splitlines()[-1])
            print(f"simulated index, val_fraction {val_fraction}: {result['tokens']:,} tokens, opened in "
                  f"{result['open']:.2f} s of CPU time, two batches of 32 rows at row 10^9 in {result['read']:.3f} s, "
                  f"{result['memory'] / 1e6:,.0f} MB")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="{stdlib}/**/*.py")
    parser.add_argument("--tokenizer", help="a folder or a Hub id; default: train one on the text")
    parser.add_argument("--batches", type=int, default=500, help="batches of 32 rows to read")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--shards", action="store_true", help="measure token shards; needs --tokenizer")
    parser.add_argument("--only", choices=("ours", "map", "start"), help=argparse.SUPPRESS)
    parser.add_argument("--val_fraction", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "start":
        print(json.dumps(start_in_index(args.text, args.val_fraction)))
        return
    if args.shards:
        measure_shards(args.text, args.tokenizer)
        return
    if args.only:
        tokenize = tokenize_ours if args.only == "ours" else tokenize_with_map
        seconds, tokens = tokenize(args.text, args.tokenizer)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_memory": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.tokenizer:
            texts = readers.SourceTexts([sources.file_source(args.text)])
            tokenizers.train_bpe(texts, 4096).save_pretrained(folder)
        results = {name: run_in_process(name, args.text, args.tokenizer or folder) for name in ("map", "ours")}
    for name, result in results.items():
        result["tokens_per_second"] = result["tokens"] / result["seconds"]
        print(
            f"tokenize, {name:<6}{result['tokens']:>14,} tokens{result['seconds']:9.1f} s"
            f"{result['tokens_per_second'] / 1e6:9.2f}M tokens/s, peak {result['peak_memory'] / 1e6:,.0f} MB"
        )
    assert results["ours"]["tokens"] == results["map"]["tokens"]
    results["ratio"] = results["ours"]["tokens_per_second"] / results["map"]["tokens_per_second"]
    print(f"tokenize, ours / map{results['ratio']:14.2f}")
    ours, memmap = measure_reading(32, args.batches, num_tokens=min(200_000_000, args.batches * 400_000))
    results["feed"] = {"ours": ours, "memmap": memmap, "ratio": ours / memmap}
    print(
        f"read rows of 1024   ours {ours / 1e6:,.0f}M tokens/s, memmap {memmap / 1e6:,.0f}M, ratio {ours / memmap:.2f}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
