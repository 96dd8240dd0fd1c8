"""Small data sets for the tasks, and the settings of small runs on them."""

import json
import random
import shutil

from conftest import flags, run_cli  # noqa: F401, flags is imported from here by the tests

BERT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
GPT = {"n_layer": 2, "n_head": 2, "n_embd": 48, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
WORDPIECE, BPE = "{train: wordpiece, vocab_size: 300}", "{train: bpe, vocab_size: 300}"
NAMES = ["anna", "boris", "carla", "dimitri"]
PLACES = ["rome", "oslo", "lima", "cairo"]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(run_dir):
    return [line for line in read_lines(run_dir / "metrics.jsonl") if "val_loss" in line]


def copy_until(run, step, target):
    """Copy a run as it was after a step."""
    shutil.copytree(run, target)
    for path in target.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    (target / "model.safetensors").unlink()


def predict(*arguments):
    """Run the predict command in this process; return its exit code."""
    return run_cli("predict", *arguments)


def generate(*arguments):
    """Run the generate command in this process; return its exit code."""
    return run_cli("generate", *arguments)


def write_sentences(path, count, seed):
    """Write sentences with names of one or two words and places; the word before tells them apart."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(count):
            for _ in range(draw.randint(1, 4)):
                if draw.random() < 0.5:
                    file.write(f"with O\n{draw.choice(NAMES + PLACES)} B-PER\n{draw.choice(NAMES)}ov I-PER\n")
                else:
                    file.write(f"near O\n{draw.choice(NAMES + PLACES)} B-LOC\nand O\n")
            file.write("\n")
    return path


def write_questions(path, count, seed, unanswerable=False):
    """Write questions whose answer is the number in one of several sentences, or that have none."""
    draw, data = random.Random(seed), []
    for index in range(count):
        sentences = [f"{draw.choice(NAMES)} went to {draw.choice(PLACES)}." for _ in range(draw.randint(2, 9))]
        has_answer = not unanswerable or index % 3
        answer = str(draw.randint(10, 19))
        if has_answer:
            sentences.insert(draw.randrange(len(sentences)), f"{draw.choice(NAMES)} has {answer} sheep.")
        context = " ".join(sentences)
        answers = [{"text": answer, "answer_start": context.index(answer)}] if has_answer else []
        qas = [{"id": f"q{index}", "question": "how many sheep?", "answers": answers, "is_impossible": not has_answer}]
        data.append({"title": "", "paragraphs": [{"context": context, "qas": qas}]})
    path.write_text(json.dumps({"version": "1", "data": data}))
    return path


def write_instructions(path):
    draw = random.Random(0)
    rows = [(f"the {draw.choice(PLACES)} of", name) for name in NAMES for _ in range(30)]
    return write_lines(
        path, [{"prompt": f"say {name}, {rest}", "completion": f" {name.upper()}"} for rest, name in rows]
    )


def write_noise(path, count, seed):
    """Random labels: what a model learns from them does not hold for other rows."""
    draw = random.Random(seed)
    rows = [
        {"text": f"{draw.choice(NAMES)} {draw.randint(0, 99)} {draw.choice(PLACES)}", "label": draw.choice("ab")}
        for _ in range(count)
    ]
    return write_lines(path, rows)
