"""The works and the peers that throughput.py and gpu.py compare.

Every peer trains in the process that calls [`run_peer`], on the same rows of random tokens, with clipping at 1.0 and
fused AdamW. Nothing is saved: a checkpoint takes the host seconds, while the GPU waits.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent


class Work(NamedTuple):
    """What a peer trains: a model, and `rows` x `length` tokens per step."""

    family: str
    task: str
    rows: int
    length: int
    config: dict
    is_shared: bool = False  # measured beside another process of low priority that keeps a core busy


def _llama(layers, width, inner, heads, key_value_heads):
    """Return the configuration of a Llama with Llama 2's vocabulary."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "vocab_size": 32000}


def _gpt(layers, width, heads, vocab_size):
    return {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocab_size}


_BERT = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072}
WORKS = {
    "tiny": Work("gpt", "causal", 4, 16, _gpt(1, 32, 2, 97)),
    "quickstart": Work("gpt", "causal", 16, 128, _gpt(4, 128, 4, 1024)),
    "busy": Work("gpt", "causal", 16, 128, _gpt(4, 128, 4, 1024), is_shared=True),
    "laptop": Work("gpt", "causal", 16, 256, _gpt(6, 384, 6, 8192)),
    "gpt": Work("gpt", "causal", 32, 1024, _gpt(12, 768, 12, 50304)),
    "llama": Work("llama", "causal", 32, 1024, _llama(12, 768, 2048, 12, 12)),
    "llama_1b": Work("llama", "causal", 8, 2048, _llama(22, 2048, 5632, 32, 4)),
    "bert": Work("bert", "mlm", 64, 512, _BERT),
}
_DROPOUTS = {
    "gpt": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "llama": ("attention_dropout",),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}
OURS = {  # peer -> keys of its recipe
    "ours": {},
    "isolated": {"packing": "documents"},
    "muon": {"optimizer": "muon"},
    "deterministic": {"deterministic": True},
}
PEERS = (*OURS, "single-file", "stock", "stock-eager", "Trainer", "Trainer-eager")
SEPARATOR = 1  # the token between documents


def shrink(work, on_gpu):
    """Return the work for a rehearsal: two layers, and without a GPU one tiny layer."""
    layers = "n_layer" if work.family == "gpt" else "num_hidden_layers"
    if on_gpu:
        return work._replace(config=work.config | {layers: 2})
    if work.family == "gpt":
        return WORKS["tiny"]
    sizes = {layers: 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 97}
    return work._replace(rows=4, length=16, config=sizes)


def model_settings(work):
    """Return the configuration of a work's model, without dropout."""
    name = "n_positions" if work.family == "gpt" else "max_position_embeddings"
    return {name: work.length} | work.config | dict.fromkeys(_DROPOUTS[work.family], 0.0)


def stock_model(work):
    """Return the stock model of a work, with random weights."""
    import transformers

    stock = {"gpt": "GPT2", "llama": "Llama", "bert": "Bert"}[work.family]
    head = {"gpt": "LMHeadModel", "llama": "ForCausalLM", "bert": "ForMaskedLM"}[work.family]
    config = getattr(transformers, f"{stock}Config")(use_cache=False, **model_settings(work))
    return getattr(transformers, stock + head)(config)


def flops_per_token(work):
    """Return the FLOPs of a training step per token; see [`~hf_myllm.reporting.flops.flops_per_token`]."""
    import torch

    from hf_myllm.reporting import flops

    with torch.device("meta"):
        return flops.flops_per_token(stock_model(work), work.length)


def child_environment():
    """Return the environment of a process that imports this checkout's package."""
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.getenv('PYTHONPATH', '')}"}


def write_corpus(work, folder, steps):
    """Write a corpus of documents of random tokens, and a tokenizer with their separator and a mask token."""
    vocabulary = work.config.get("vocab_size", 30522)
    draw = np.random.default_rng(0)
    tokens = draw.integers(10, vocabulary, (steps + 1) * work.rows * work.length + 1)
    tokens[draw.random(len(tokens)) < 1 / 300] = SEPARATOR
    tokens[0] = SEPARATOR
    tokens.astype(np.uint16).tofile(Path(folder) / "corpus.bin")

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[SEP]", "[CLS]", "[UNK]", "[MASK]"]
    vocab = {word: token_id for token_id, word in enumerate([*special, *(f"w{n}" for n in range(vocabulary - 5))])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{word[1:-1].lower()}_token": word for word in special} | {"eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(Path(folder) / "tokenizer")


def run_peer(peer, work, folder, precision="no", is_compiled=False, warmup=10, steps=40):
    """Train in this process; return the tokens per second of the steps after the warmup, and the peak memory in bytes.

    Args:
        peer: one of `PEERS`; "-eager" at its end means not compiled.
        work: a [`Work`].
        folder: with the files of [`write_corpus`]; our runs write theirs into it.
        precision: "no", "bf16", "fp16" or "fp8", as in accelerate.
    """
    import resource

    if peer in OURS:
        import hf_myllm  # noqa: F401, before torch, as the command does: it sets how threads wait for each other
    import torch

    if peer in OURS:
        settings = OURS[peer] | {"precision": "fp32" if precision == "no" else precision}
        seconds = by_ours(work, Path(folder), settings, warmup, steps, is_compiled)
    else:
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        name, is_eager, _ = peer.partition("-eager")
        seconds = train_peer(name, work, folder, precision, is_compiled and not is_eager, warmup, steps)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return steps * work.rows * work.length / max(seconds, 1e-3), peak  # a rehearsal may take no measurable time


# ---- this trainer


class Finished(BaseException):
    """Ends a run after its last step, before it is saved."""


def run_recipe(recipe, **callbacks):
    """Train a recipe until it ends or [`Finished`] is raised.

    Args:
        callbacks: `on_log` and `on_evaluate` of [`~hf_myllm.train`].
    """
    from hf_myllm.train import train

    try:
        train(recipe, **callbacks)
    except Finished:
        return


def by_ours(work, folder, settings, warmup, steps, is_compiled):
    """Train with the defaults, except for what makes the work the same; return the seconds of the timed steps.

    Args:
        settings: more keys of the recipe; the run's files are removed unless they name a folder for them.
    """
    from hf_myllm.recipe import Recipe

    options = {"model": work.family, "task": work.task, "train_file": str(folder / "corpus.bin"), "val_fraction": 0}
    options |= {"max_len": work.length, "batch_size": work.rows, "max_steps": warmup + steps, "compile": is_compiled}
    options |= {"config": model_settings(work), "log_level": "warning"} | settings
    if work.task == "mlm" or "packing" in settings:
        options["tokenizer"] = str(folder / "tokenizer")
    times = {}

    def note(line):
        times[line["step"]] = line["train_seconds"]
        if line["step"] == warmup + steps:
            raise Finished

    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        run_recipe(Recipe.load(None, **{"save_model": run_dir} | options), on_log=note)
    return times[warmup + steps] - times[warmup]


# ---- the other peers


def train_peer(peer, work, folder, precision, is_compiled, warmup, steps):
    """Train another peer; return the seconds of the timed steps."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        torch.set_num_threads(os.cpu_count())  # as our trainer does
    torch.manual_seed(0)
    if peer == "single-file" and (work.family != "gpt" or precision not in ("no", "bf16")):
        raise SystemExit("--peers: single-file trains a GPT in fp32 or bf16 only; leave it out")
    tokens = torch.from_numpy(np.fromfile(Path(folder) / "corpus.bin", dtype=np.uint16).astype(np.int64))
    tokens = tokens[: (steps + warmup) * work.rows * work.length].view(-1, work.length)
    collate = None
    if work.task == "mlm":
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def batch(items):
        if collate is not None:
            return collate([{"input_ids": item} for item in items])
        return {"input_ids": torch.stack(items), "labels": torch.stack(items)}

    model = plain_gpt(work.length, **work.config) if peer == "single-file" else stock_model(work)
    run = {"stock": by_accelerate, "Trainer": by_trainer, "single-file": by_hand}[peer]
    return run(model, tokens, batch, work.rows, warmup, steps, precision, is_compiled)


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
