"""Compare training throughput: this trainer and its alternatives.

    python benchmarks/throughput.py quickstart                       # GPT of 0.94M, 16 x 128, on a CPU
    python benchmarks/throughput.py laptop --precision bf16          # GPT of 14M, 16 x 256, on a CPU with bf16
    python benchmarks/throughput.py gpt --compile --precision bf16 \\                       # on a GPU
        --peers ours isolated single-file stock Trainer Trainer-eager
    python benchmarks/throughput.py llama llama_1b --compile --precision bf16
    python benchmarks/throughput.py bert --compile --precision bf16 --peers ours stock stock-eager

Peers:
    ours          this trainer
    isolated      this trainer with `packing: documents`; documents have 300 tokens on average
    single-file   a GPT and its loop in plain torch, in nanoGPT's published setting: no biases, autocast, fused AdamW,
                  a loss read every 10 steps
    stock         the stock model in a plain accelerate loop that reads its loss at each step
    Trainer       the transformers Trainer
    stock-eager, Trainer-eager   the same, not compiled when --compile is given

The peers run in turn, several times, each in its own process, on the same rows of random tokens, with clipping at 1.0
and fused AdamW. Steps are timed after a warmup.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
WORKLOADS = {  # name -> (family, task, rows per step, tokens per row, configuration)
    "tiny": ("gpt", "causal", 4, 16, {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 97}),
    "quickstart": ("gpt", "causal", 16, 128, {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024}),
    "laptop": ("gpt", "causal", 16, 256, {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 8192}),
    "gpt": ("gpt", "causal", 32, 1024, {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304}),
    "llama": (
        "llama",
        "causal",
        32,
        1024,
        {
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "vocab_size": 50304,
        },
    ),
    "llama_1b": (
        "llama",
        "causal",
        8,
        2048,
        {
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "vocab_size": 32000,
        },
    ),
    "bert": (
        "bert",
        "mlm",
        64,
        512,
        {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072},
    ),
}
DROPOUTS = {
    "gpt": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "llama": ("attention_dropout",),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}
PEERS = ("ours", "isolated", "single-file", "stock", "stock-eager", "Trainer", "Trainer-eager")
SEPARATOR = 1  # the token between documents


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workloads", nargs="*", default=["quickstart"], choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS)
    )
    parser.add_argument("--peers", nargs="+", default=["ours", "stock", "Trainer"], choices=PEERS)
    parser.add_argument("--steps", type=int, default=40, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the timed ones")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each peer")
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16", "fp8"))
    parser.add_argument("--compile", action="store_true", help="compile all peers")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1:
        parser.error("--warmup and --steps must be at least 1")
    results = {"versions": versions(), "precision": args.precision, "compile": args.compile, "workloads": {}}
    for workload in args.workloads:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_corpus(workload, folder, args.steps + args.warmup)
            runs = {peer: [] for peer in args.peers}
            for repeat in range(args.repeats):
                for peer in args.peers:
                    runs[peer].append(measure(peer, workload, folder / f"{peer}-{repeat}", folder, args))
        results["workloads"][workload] = show(workload, runs)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def show(workload, runs_of):
    """Print a table of medians; return the measurements of each peer."""
    family, task, rows, length, _ = WORKLOADS[workload]
    print(f"\n{workload}: {family}, {task}, {rows} x {length} tokens per step")
    best = {peer: statistics.median(tokens for tokens, _ in runs) for peer, runs in runs_of.items()}
    result = {}
    for peer, runs in runs_of.items():
        speeds, memory = [tokens for tokens, _ in runs], max(memory for _, memory in runs)
        ratio = best.get("ours", best[peer]) / best[peer]
        result[peer] = {"tokens_per_second": speeds, "peak_memory_gb": memory, "ours_over_it": ratio}
        print(
            f"  {peer:<13} {best[peer]:>12,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f}), {memory:.2f} GB; "
            f"ours is {ratio:.2f} times as fast"
        )
    return result


def versions():
    import accelerate
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    names = {"torch": torch, "transformers": transformers, "accelerate": accelerate}
    return {name: module.__version__ for name, module in names.items()} | {"device": device}


def write_corpus(workload, folder, steps):
    """Write a corpus of documents of random tokens, and a tokenizer with their separator and a mask token."""
    family, task, rows, length, config = WORKLOADS[workload]
    vocabulary = config.get("vocab_size", 30522)
    draw = np.random.default_rng(0)
    tokens = draw.integers(10, vocabulary, (steps + 1) * rows * length + 1)
    tokens[draw.random(len(tokens)) < 1 / 300] = SEPARATOR
    tokens[0] = SEPARATOR
    tokens.astype(np.uint16).tofile(folder / "corpus.bin")

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[SEP]", "[CLS]", "[UNK]", "[MASK]"]
    vocab = {word: token_id for token_id, word in enumerate([*special, *(f"w{n}" for n in range(vocabulary - 5))])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{word[1:-1].lower()}_token": word for word in special} | {"eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder / "tokenizer")


def measure(peer, workload, run, folder, args):
    """Return tokens per second and peak memory (GB) of one run in its own process."""
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": args.precision, "HF_HUB_OFFLINE": "1"}
    environment |= {} if args.precision != "fp8" else {"ACCELERATE_FP8_BACKEND": "AO"}
    is_ours = peer in ("ours", "isolated")
    if is_ours:
        packing = ["--packing", "documents", "--tokenizer", folder / "tokenizer"] if peer == "isolated" else []
        command = [sys.executable, "-m", "hf_myllm.train", *flags(workload, run, folder, args), *packing]
    else:
        name, is_eager, _ = peer.partition("-eager")
        options = [
            args.precision,
            "compile" if args.compile and not is_eager else "eager",
            args.warmup,
            args.steps,
        ]
        command = [sys.executable, __file__, "--peer", name, workload, folder, *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{peer} failed: {done.stderr[-2000:]}")
    if not is_ours:
        return tuple(json.loads(done.stdout.splitlines()[-1]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = {line["step"]: line for line in lines if "loss" in line}
    first, last = lines[args.warmup], lines[args.warmup + args.steps]
    _, _, rows, length, _ = WORKLOADS[workload]
    seconds = last["train_seconds"] - first["train_seconds"]
    return args.steps * rows * length / seconds, last["peak_memory_gb"]


def flags(workload, run, folder, args):
    """Return the flags of our run: the defaults, except for what makes the workload the same."""
    family, task, rows, length, config = WORKLOADS[workload]
    options = {"model": family, "task": task, "train_file": folder / "corpus.bin", "val_fraction": 0, "max_len": length}
    options |= {"batch_size": rows, "max_steps": args.warmup + args.steps, "save_model": run, "eval_iter": 1}
    options |= {"save_freq": "null", "compile": args.compile} | config | dict.fromkeys(DROPOUTS[family], 0.0)
    options |= {"tokenizer": folder / "tokenizer"} if task == "mlm" else {}
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


# ---- the other peers


def train_peer(peer, workload, folder, precision, mode, warmup, steps):
    """Train another peer in this process; print tokens per second and peak memory."""
    import resource

    import torch
    import transformers

    if not torch.cuda.is_available():
        torch.set_num_threads(os.cpu_count())  # as our trainer does
    family, task, rows, length, config = WORKLOADS[workload]
    warmup, steps = int(warmup), int(steps)
    torch.manual_seed(0)
    if peer == "single-file" and (family != "gpt" or precision not in ("no", "bf16")):
        raise SystemExit("--peers: single-file trains a GPT in fp32 or bf16 only; leave it out")
    stock = {"gpt": "GPT2", "llama": "Llama", "bert": "Bert"}[family]
    head = {"gpt": "LMHeadModel", "llama": "ForCausalLM", "bert": "ForMaskedLM"}[family]
    name = "n_positions" if family == "gpt" else "max_position_embeddings"
    settings = {name: length, "use_cache": False} | config | dict.fromkeys(DROPOUTS[family], 0.0)
    if family == "llama":
        settings["tie_word_embeddings"] = False
    model = getattr(transformers, stock + head)(getattr(transformers, f"{stock}Config")(**settings))
    tokens = torch.from_numpy(np.fromfile(Path(folder) / "corpus.bin", dtype=np.uint16).astype(np.int64))
    tokens = tokens[: (steps + warmup) * rows * length].view(-1, length)
    collate = None
    if task == "mlm":
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def batch(items):
        if collate is not None:
            return collate([{"input_ids": item} for item in items])
        return {"input_ids": torch.stack(items), "labels": torch.stack(items)}

    if peer == "single-file":
        model = plain_gpt(length, **config)
    run = {"stock": by_accelerate, "Trainer": by_trainer, "single-file": by_hand}[peer]
    seconds = run(model, tokens, batch, rows, warmup, steps, precision, mode == "compile")
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([steps * rows * length / seconds, peak / 1e9]))


def now():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def by_accelerate(model, tokens, batch, rows, warmup, steps, precision, is_compiled):
    """Train with a plain accelerate loop; return the seconds of the timed steps."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import TorchDynamoPlugin

    accelerator = Accelerator(dynamo_plugin=TorchDynamoPlugin(backend="inductor") if is_compiled else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    loader = torch.utils.data.DataLoader(tokens, batch_size=rows, shuffle=True, collate_fn=batch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, inputs in enumerate(loader):
        if step == warmup:
            start = now()
        loss = model(**inputs).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return now() - start


def plain_gpt(length, n_layer, n_head, n_embd, vocab_size):
    """Return a GPT in plain torch: no biases, no dropout, tied embeddings."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(n_embd, bias=False) for _ in range(2))
            self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)
            self.wide, self.back = nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(4 * n_embd, n_embd, bias=False)

        def forward(self, x):
            shape = (*x.shape[:2], n_head, n_embd // n_head)
            q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norms[0](x)).split(n_embd, dim=2))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
            return x + self.back(nn.functional.gelu(self.wide(self.norms[1](x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(length, n_embd)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(n_layer)), nn.LayerNorm(n_embd, bias=False)
            self.head = nn.Linear(n_embd, vocab_size, bias=False)
            self.head.weight = self.tokens.weight
            for matrix in (parameter for parameter in self.parameters() if parameter.dim() == 2):
                nn.init.normal_(matrix, std=0.02)

        def forward(self, ids, targets):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            for block in self.blocks:
                x = block(x)
            logits = self.head(self.norm(x))
            return logits, nn.functional.cross_entropy(logits.view(-1, vocab_size), targets.view(-1))

    return GPT()


def by_hand(model, tokens, batch, rows, warmup, steps, precision, is_compiled):
    """Train with a plain torch loop; return the seconds of the timed steps."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model) if is_compiled else model
    flat, length = tokens.flatten(), tokens.shape[1]

    def read():
        starts = torch.randint(len(flat) - length - 1, (rows,))
        pair = [torch.stack([flat[at + ahead : at + ahead + length] for at in starts]) for ahead in (0, 1)]
        return [part.pin_memory().to(device, non_blocking=True) if device == "cuda" else part for part in pair]

    ids, targets = read()
    for step in range(warmup + steps):
        if step == warmup:
            start = now()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            _, loss = compiled(ids, targets)
        ids, targets = read()  # while the device works
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            loss.item()
    return now() - start


def by_trainer(model, tokens, batch, rows, warmup, steps, precision, is_compiled):
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step in (warmup, warmup + steps):
                times[state.global_step] = now()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=warmup + steps,
            learning_rate=3e-4,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=not torch.cuda.is_available(),
            torch_compile=is_compiled,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=[row for row in tokens],
            data_collator=batch,
            callbacks=[Clock()],
        ).train()
    return times[warmup + steps] - times[warmup]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        train_peer(*sys.argv[2:])
    else:
        main()
