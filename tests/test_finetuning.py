"""Words, answers, instructions, the best model, LoRA and predictions: trained, and used by stock transformers."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, train
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from seqeval.metrics import f1_score
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from hf_myllm.predict import main as predict_main
from hf_myllm.reporting.console import format_loss
from hf_myllm.reporting.metrics_log import best_evaluation

BERT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
GPT = {"n_layer": 2, "n_head": 2, "n_embd": 48, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
WORDPIECE, BPE = "{train: wordpiece, vocab_size: 300}", "{train: bpe, vocab_size: 300}"
NAMES = ["anna", "boris", "carla", "dimitri"]
PLACES = ["rome", "oslo", "lima", "cairo"]


def flags(**words):
    return [text for key, value in words.items() if value is not None for text in (f"--{key}", str(value))]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(run):
    return [line for line in lines(run / "metrics.jsonl") if "val_loss" in line]


def predict(*arguments):
    try:
        return predict_main([str(argument) for argument in arguments]) or 0
    except SystemExit as exit:
        return exit.code


# ---- real text messages


def test_a_recipe_tells_spam_from_other_messages(tmp_path, assets):
    data = assets / "tasks" / "sms_spam"
    words = {"train_file": data / "train_data.csv", "val_file": data / "test_data.csv", "text_column": "message"}
    words |= {"max_steps": 120, "warmup_steps": 50, "eval_freq": 1000, "save_model": tmp_path / "run"}
    assert train(ROOT / "recipes" / "sms_spam_gpt.yaml", *flags(**words)) == 0
    assert evaluations(tmp_path / "run")[-1]["val_f1"] > 0.85  # 0.967 and more after all of the recipe's epochs


# ---- words


def write_sentences(path, count, seed):
    """Names of one or two words, and places; the word before tells them apart."""
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


@pytest.fixture(scope="module")
def words_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_sentences(folder / "train.conll", 300, 0)
    write_sentences(folder / "val.conll", 61, 1)
    words = {"model": "bert", "task": "token_classification", **BERT, **DROPOUT, "tokenizer": WORDPIECE, "max_len": 16}
    words |= {"train_file": folder / "train.conll", "val_file": folder / "val.conll", "save_model": folder / "run"}
    assert train(*flags(**words, batch_size=16, epochs=12, learning_rate=5e-3, eval_freq=100)) == 0
    return folder


def test_words_are_told_apart_and_stock_transformers_says_the_same(words_run, capsys):
    run = words_run / "run"
    model, loading = AutoModelForTokenClassification.from_pretrained(run, output_loading_info=True)
    assert type(model).__name__ == "BertForTokenClassification"
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    tokenizer, names = AutoTokenizer.from_pretrained(run), model.config.id2label
    sentences = [
        [line.split() for line in one.splitlines()] for one in (words_run / "val.conll").read_text().split("\n\n")
    ]
    wanted, said = [], []
    for sentence in filter(None, sentences):
        words, labels = zip(*sentence, strict=True)
        # as many words as fit 16 tokens, and then the next, each by its first token
        found, begin = [], 0
        while begin < len(words):
            end = len(words)
            while len(tokenizer(list(words[begin:end]), is_split_into_words=True)["input_ids"]) > 16:
                end -= 1
            coded = tokenizer(list(words[begin:end]), is_split_into_words=True, return_tensors="pt")
            with torch.no_grad():
                best = model.eval()(**coded).logits[0].argmax(-1).tolist()
            places = coded.word_ids()
            found += [names[best[places.index(word)]] for word in range(end - begin)]
            begin = end
        wanted.append(list(labels))
        said.append(found)
    figures = evaluations(run)[-1]
    assert figures["val_f1"] == pytest.approx(f1_score(wanted, said))
    assert figures["val_f1"] > 0.8
    assert "val_perplexity" not in figures
    assert predict(run, "--input", words_run / "val.conll", "--output", words_run / "said.jsonl") == 0
    rows = lines(words_run / "said.jsonl")
    assert [row["labels"] for row in rows] == said
    entity = rows[0]["entities"][0]
    assert entity["type"] in ("PER", "LOC")
    assert entity["text"] == " ".join(rows[0]["tokens"][entity["first"] : entity["last"] + 1])
    found = pipeline("token-classification", str(run), aggregation_strategy="simple")("with carla borisov")
    assert found[0]["entity_group"] == "PER"
    judged = set()
    for size in (1, 7, 64):
        capsys.readouterr()
        assert train(run / "recipe.yaml", "--eval_only", "--load_model", run, "--batch_size", size) == 0
        judged.add(capsys.readouterr().out)
    assert len(judged) == 1
    assert f"f1 {figures['val_f1']:.4f}" in judged.pop()


def test_labels_of_no_entities_are_judged_one_by_one(tmp_path):
    rows = [{"tokens": ["a", "bb", "a"][: n % 3 + 1], "label": ["DET", "NOUN", "DET"][: n % 3 + 1]} for n in range(60)]
    words = {
        "model": "bert",
        "task": "token_classification",
        **BERT,
        "tokenizer": "{train: wordpiece, vocab_size: 100}",
    }
    words |= {"train_file": write_lines(tmp_path / "a.jsonl", rows), "max_len": 16, "save_model": tmp_path / "run"}
    assert train(*flags(**words, max_steps=2, val_fraction=0.2)) == 0
    assert {"val_accuracy", "val_f1_macro"} <= set(evaluations(tmp_path / "run")[-1])
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab()
    assert "bb" in vocabulary
    assert not any("DET" in token for token in vocabulary)
    (tmp_path / "lines.txt").write_text("a bb a\nbb\n")
    assert predict(tmp_path / "run", "--input", tmp_path / "lines.txt", "--output", tmp_path / "out.jsonl") == 0
    assert [row["tokens"] for row in lines(tmp_path / "out.jsonl")] == [["a", "bb", "a"], ["bb"]]


# ---- answers


def write_questions(path, count, seed, unanswerable=False):
    """The answer is the number, in one of several sentences, or there is none."""
    draw, data = random.Random(seed), []
    for number in range(count):
        sentences = [f"{draw.choice(NAMES)} went to {draw.choice(PLACES)}." for _ in range(draw.randint(2, 9))]
        has_answer = not unanswerable or number % 3
        answer = str(draw.randint(10, 19))
        if has_answer:
            sentences.insert(draw.randrange(len(sentences)), f"{draw.choice(NAMES)} has {answer} sheep.")
        context = " ".join(sentences)
        answers = [{"text": answer, "answer_start": context.index(answer)}] if has_answer else []
        qas = [{"id": f"q{number}", "question": "how many sheep?", "answers": answers, "is_impossible": not has_answer}]
        data.append({"title": "", "paragraphs": [{"context": context, "qas": qas}]})
    path.write_text(json.dumps({"version": "1", "data": data}))
    return path


@pytest.mark.parametrize("unanswerable", [False, True])
def test_answers_are_found_and_stock_transformers_finds_the_same(tmp_path, unanswerable, capsys):
    words = {"model": "bert", "task": "question_answering", **BERT, **DROPOUT, "max_len": 48, "batch_size": 16}
    words |= {"train_file": write_questions(tmp_path / "train.json", 250, 0, unanswerable), "learning_rate": 5e-3}
    words |= {"val_file": write_questions(tmp_path / "val.json", 41, 1, unanswerable), "save_model": tmp_path / "run"}
    words["tokenizer"] = WORDPIECE
    assert train(*flags(**words, epochs=6, warmup_steps=20)) == 0
    run, figures = tmp_path / "run", evaluations(tmp_path / "run")[-1]
    assert figures["val_exact_match"] > 0.8
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    assert type(model).__name__ == "BertForQuestionAnswering"
    right = count = 0
    for article in json.loads((tmp_path / "val.json").read_text())["data"]:
        context, (qas,) = article["paragraphs"][0]["context"], article["paragraphs"][0]["qas"]
        coded = tokenizer(qas["question"], context, return_tensors="pt", return_offsets_mapping=True)
        offsets = coded.pop("offset_mapping")[0].tolist()
        if len(offsets) > 48:  # several windows: looked at in tests/data
            continue
        with torch.no_grad():
            said = model(**coded)
        best, answer = -np.inf, None
        inside = [place for place, kind in enumerate(coded.sequence_ids(0)) if kind == 1]
        for a in inside:
            for b in inside:
                score = (said.start_logits[0, a] + said.end_logits[0, b]).item()
                if a <= b < a + 30 and score > best:
                    best, answer = score, context[offsets[a][0] : offsets[b][1]]
        if unanswerable and (said.start_logits[0, 0] + said.end_logits[0, 0]).item() > best:
            answer = ""
        predicted = next(row for row in predictions(tmp_path) if row["id"] == qas["id"])
        assert predicted["answer"] == answer
        count += 1
        right += answer == (qas["answers"][0]["text"] if qas["answers"] else "")
    assert count > 10
    rows = predictions(tmp_path)
    assert len(rows) == 41
    assert all(row["guesses"][0]["answer"] == row["answer"] and 0 < row["score"] <= 1 for row in rows)
    assert any(row["answer"] == "" for row in rows) == unanswerable
    # a checkpoint is asked with the run's own recipe
    output = tmp_path / "checkpoint.jsonl"
    (checkpoint,) = run.glob("checkpoint-*")
    assert predict(checkpoint, "--input", tmp_path / "val.json", "--output", output) == 0
    assert lines(output) == rows
    for size in (1, 5):
        capsys.readouterr()
        assert train(run / "recipe.yaml", "--eval_only", "--load_model", run, "--batch_size", size) == 0
        assert f"validation loss {format_loss(figures['val_loss'])}" in capsys.readouterr().out
    assert f"unanswerable: {str(unanswerable).lower()}" in (run / "recipe.yaml").read_text()


def predictions(folder):
    output = folder / "said.jsonl"
    if not output.exists():
        assert predict(folder / "run", "--input", folder / "val.json", "--output", output) == 0
    return lines(output)


# ---- instructions


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """A small GPT that knows a little, to start from."""
    folder = tmp_path_factory.mktemp("gpt")
    text = write_lines(
        folder / "text.jsonl", [{"text": f"say {name}: {name}. {place}"} for name in NAMES for place in PLACES]
    )
    words = flags(**GPT, tokenizer=BPE, train_file=text, max_len=64, max_steps=60, batch_size=4, val_fraction=0)
    assert train(*words, "--learning_rate", "5e-3", "--save_model", folder / "run") == 0
    return folder / "run"


def instructions(path):
    draw = random.Random(0)
    rows = [(f"the {draw.choice(PLACES)} of", name) for name in NAMES for _ in range(30)]
    return write_lines(
        path, [{"prompt": f"say {name}, {rest}", "completion": f" {name.upper()}"} for rest, name in rows]
    )


def test_instructions_are_followed_and_judged_by_lm_eval(tmp_path, gpt):
    words = flags(
        model="gpt", task="instruction", init_from=gpt, max_len=64, batch_size=8, learning_rate=5e-3, epochs=40
    )
    words += flags(
        train_file=instructions(tmp_path / "a.jsonl"),
        save_model=tmp_path / "run",
        start_context="say carla, the oslo of",
        max_new_tokens=9,
        temperature=0,
    )
    assert train(*words) == 0
    last = evaluations(tmp_path / "run")[-1]
    assert last["sample"] == "say carla, the oslo of CARLA"  # and there it ends
    assert last["val_loss"] < 0.1
    generated = pipeline("text-generation", str(tmp_path / "run"))(
        "say boris, the rome of", max_new_tokens=9, do_sample=False
    )
    assert generated[0]["generated_text"] == "say boris, the rome of BORIS"
    questions = [
        {"question": f"say {name}, the lima of", "choices": [n.upper() for n in NAMES], "right": n}
        for n, name in enumerate(NAMES)
    ]
    write_lines(tmp_path / "q.jsonl", questions)
    (tmp_path / "say.yaml").write_text(
        f"task: say\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{tmp_path / 'q.jsonl'}'}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: right\nmetric_list: [{metric: acc}]\n"
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path / 'run'}",
        "--tasks",
        "say",
    ]
    command += ["--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["say"]["acc,none"] == 1


def test_a_chat_template_from_a_file_goes_with_the_model(tmp_path, gpt):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [[{"role": "user", "content": name}, {"role": "assistant", "content": name.upper()}] for name in NAMES]
    data = write_lines(tmp_path / "a.jsonl", [{"messages": one} for one in turns * 10])
    words = flags(
        model="gpt",
        task="instruction",
        init_from=gpt,
        max_len=64,
        max_steps=2,
        train_file=data,
        save_model=tmp_path / "run",
    )
    assert train(*words) == 2  # the tokenizer has none
    assert train(*words, "--chat_template", tmp_path / "chat.jinja") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.apply_chat_template(turns[0], tokenize=False) == "user: anna\nassistant: ANNA\n"
    assert train(tmp_path / "run" / "recipe.yaml", "--init_from", "resume", "--max_steps", 4, "--allow_changed") == 0


def test_a_chat_ends_where_its_template_says(tmp_path, gpt):
    """The end of a turn is no end of text for the tokenizer, and yet stock generation stops there."""
    (tmp_path / "chatml.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(gpt)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    turns = [[{"role": "user", "content": name}, {"role": "assistant", "content": f"say {name}"}] for name in NAMES]
    data = write_lines(tmp_path / "a.jsonl", [{"messages": one} for one in turns * 20])
    words = flags(
        model="gpt", task="instruction", init_from=gpt, max_len=48, epochs=25, learning_rate=5e-3, batch_size=8
    )
    words += flags(tokenizer=tmp_path / "tokenizer", vocab_size=len(tokenizer), chat_template=tmp_path / "chatml.jinja")
    assert train(*words, *flags(train_file=data, val_file=data, save_model=tmp_path / "run")) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    said = run_command(tmp_path / "run", "--chat", "--prompt", "carla", "--temperature", 0, module="hf_myllm.generate")
    assert said.stdout.strip() == "say carla"
    found = pipeline("text-generation", str(tmp_path / "run"))(turns[2][:1], do_sample=False, max_new_tokens=30)
    assert found[0]["generated_text"][-1]["content"].strip() == "say carla"
    assert run_command(gpt, "--chat", "--prompt", "x", module="hf_myllm.generate").returncode == 2


# ---- the best


def noisy(path, count, seed):
    """Labels that nothing tells: what is learned of them is wrong."""
    draw = random.Random(seed)
    rows = [
        {"text": f"{draw.choice(NAMES)} {draw.randint(0, 99)} {draw.choice(PLACES)}", "label": draw.choice("ab")}
        for _ in range(count)
    ]
    return write_lines(path, rows)


@pytest.fixture
def noise(tmp_path):
    words = {"model": "gpt", "task": "classification", **GPT, "tokenizer": BPE, "max_len": 32, "batch_size": 8}
    words |= {"train_file": noisy(tmp_path / "train.jsonl", 64, 0), "val_file": noisy(tmp_path / "val.jsonl", 40, 1)}
    return words | {
        "learning_rate": 5e-3,
        "lr_schedule": "constant",
        "eval_freq": 4,
        "save_freq": 10,
        "save_model": tmp_path / "run",
    }


def test_the_best_is_kept_and_patience_ends(tmp_path, noise, capsys):
    assert train(*flags(**noise, max_steps=200, metric_for_best="loss", patience=4)) == 0
    run, said = tmp_path / "run", capsys.readouterr().out
    found = {line["step"]: line["val_loss"] for line in evaluations(run) if line["step"]}
    best = min(found, key=found.get)
    assert list(found) == list(range(4, best + 17, 4))  # four evaluations that were no better, and not one more
    assert f"best        val_loss {found[best]:.4f} after step {best}; {run} holds the best" in said
    kept = {path.name for path in run.glob("checkpoint-*")}
    assert f"checkpoint-{best}" in kept
    assert f"checkpoint-{best + 16}" in kept
    assert (run / "model.safetensors").read_bytes() == (run / f"checkpoint-{best}" / "model.safetensors").read_bytes()
    assert train(run / "recipe.yaml", "--init_from", "resume") == 0
    assert f"is finished, after {best + 16} steps; raise patience" in capsys.readouterr().out
    assert (
        train(
            *flags(
                **noise | {"save_model": tmp_path / "last"},
                max_steps=200,
                metric_for_best="loss",
                patience=4,
                final_model="last",
            )
        )
        == 0
    )
    last = tmp_path / "last"
    assert (last / "model.safetensors").read_bytes() == (
        last / f"checkpoint-{best + 16}" / "model.safetensors"
    ).read_bytes()
    assert (last / f"checkpoint-{best}").is_dir()
    # another wish is followed, without training
    assert train(last / "recipe.yaml", "--init_from", "resume", "--final_model", "best") == 0
    assert (last / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert len(evaluations(last)) == len(evaluations(run))


def test_a_signal_at_the_last_evaluation_of_patience_changes_nothing(tmp_path, noise):
    words = {**noise, "max_steps": 200, "metric_for_best": "loss", "patience": 2}
    assert train(*flags(**words)) == 0
    run = tmp_path / "run"
    whole, weights = evaluations(run), (run / "model.safetensors").read_bytes()
    last = whole[-1]["step"]
    # what a signal leaves: the checkpoint of that step, without its evaluation
    text = [line for line in lines(run / "metrics.jsonl") if line["step"] < last or "val_loss" not in line]
    write_lines(run / "metrics.jsonl", text)
    (run / "model.safetensors").unlink()
    assert train(*flags(**words, init_from="resume")) == 0
    assert evaluations(run) == whole
    assert (run / "model.safetensors").read_bytes() == weights


def test_a_run_that_was_cut_short_finds_the_same_best(tmp_path, noise):
    words = {**noise, "max_steps": 40, "metric_for_best": "loss", "save_total_limit": 9}
    assert train(*flags(**words)) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    best = best_evaluation(run, "val_loss", 40)[0]
    shutil.copytree(run, other)
    for path in other.glob("*.safetensors"):
        path.unlink()
    for step in range(21, 41):
        shutil.rmtree(other / f"checkpoint-{step}", ignore_errors=True)
    assert train(*flags(**words | {"save_model": other, "init_from": "resume"})) == 0
    assert [line["val_loss"] for line in evaluations(other)] == [line["val_loss"] for line in evaluations(run)]
    assert best_evaluation(other, "val_loss", 40)[0] == best
    assert (other / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_what_is_best_must_be_known(tmp_path, noise, capsys):
    for more, message in (
        (
            {"metric_for_best": "f2"},
            "metric_for_best: val_f2 is not a metric of task classification; choose one of val_loss, val_acc",
        ),
        ({"patience": 2}, "patience 2 needs a metric; give --metric_for_best"),
        ({"final_model": "best"}, "final_model best needs a metric"),
        ({"metric_for_best": "loss", "eval_freq": None}, "needs several evaluations; give --eval_freq"),
        (
            {"metric_for_best": "loss", "val_file": None, "val_fraction": 0},
            "metric_for_best: there are no validation rows",
        ),
        ({"metrics": "no_such_metric_anywhere"}, "metric no_such_metric_anywhere cannot be loaded"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert train(*flags(**noise | {"max_steps": 8} | more)) == 2
        assert message in capsys.readouterr().err


METRIC = """
import datasets
import evaluate
class Halves(evaluate.Metric):
    def _info(self):
        whole = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=whole)
    def _compute(self, predictions, references):
        return {"rows": len(references), "f1": 0.5}
"""


def test_which_way_is_better(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": n, "train_loss": 0, "val_x": x, "val_wer": x} for n, x in ((0, 9), (2, 3), (4, 5), (6, None))],
    )
    assert best_evaluation(tmp_path, "val_x", 9) == (4, 5, 1)
    assert best_evaluation(tmp_path, "val_wer", 9) == (2, 3, 2)
    assert best_evaluation(tmp_path, "val_x", 9, greater_is_better=False) == (2, 3, 2)
    assert best_evaluation(tmp_path, "val_y", 9) == (None, None, 0)  # which no evaluation knew yet
    write_lines(tmp_path / "metrics.jsonl", [{"step": n, "train_loss": 0, "val_x": None} for n in (2, 4)])
    assert best_evaluation(tmp_path, "val_x", 9) == (None, None, 2)


def test_other_metrics_of_the_library(tmp_path, noise):
    (tmp_path / "halves.py").write_text(METRIC)
    assert train(*flags(**noise, max_steps=2, metrics=tmp_path / "halves.py")) == 0
    figures = evaluations(tmp_path / "run")[-1]
    assert figures["val_rows"] == 40
    assert figures["val_halves_f1"] == 0.5
    assert "val_f1" in figures


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path, noise, capsys):
    with open(noise["train_file"], "a") as file:
        file.write('{"text": "x", "label": null}\n{"text": "y"}\n')
    assert train(*flags(**noise, max_steps=2)) == 2
    assert "train.jsonl line 65 has no label" in capsys.readouterr().err
    assert train(*flags(**noise, max_steps=2), "--skip_bad_rows") == 0
    assert re.search("skipped 2 rows of the training data, for example .*line 65 has no label", capsys.readouterr().out)
    write_lines(tmp_path / "other.jsonl", [*lines(noise["val_file"]), {"text": "x", "label": "c"}])
    judged = flags(val_file=tmp_path / "other.jsonl", load_model=tmp_path / "run")
    assert train(tmp_path / "run" / "recipe.yaml", "--eval_only", *judged, "--skip_bad_rows") == 0
    assert "skipped 1 row of the validation data" in capsys.readouterr().out


def test_a_head_keeps_what_its_labels_mean(tmp_path, noise, capsys):
    """A head whose labels are the same stays, in its own order; one of other labels starts fresh, however many."""
    assert train(*flags(**noise, max_steps=60)) == 0
    run, turned = tmp_path / "run", tmp_path / "turned"
    model = AutoModelForSequenceClassification.from_pretrained(run)
    model.score.weight.data = model.score.weight.data.flip(0)
    model.config.id2label, model.config.label2id = {0: "b", 1: "a"}, {"b": 0, "a": 1}
    model.save_pretrained(turned)
    AutoTokenizer.from_pretrained(run).save_pretrained(turned)
    same = flags(
        model="gpt", task="classification", train_file=noise["val_file"], val_file=noise["val_file"], max_steps=1
    )
    for start in (run, turned):
        assert (
            train(*same, *flags(init_from=start, save_model=tmp_path / f"from_{start.name}", learning_rate=1e-12)) == 0
        )
        assert "fresh" not in capsys.readouterr().out
    before = evaluations(run)[-1]
    for name in ("from_run", "from_turned"):
        assert evaluations(tmp_path / name)[-1]["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "from_turned").id2label == {0: "b", 1: "a"}
    numbers = [{"text": line["text"], "label": number} for number, line in enumerate(lines(noise["val_file"]))]
    data = write_lines(tmp_path / "numbers.jsonl", numbers)
    words = {"model": "gpt", "task": "classification", "problem_type": "regression", "train_file": data, "max_steps": 1}
    assert train(*flags(**words, init_from=run, save_model=tmp_path / "first")) == 0
    assert "newly initialized: score.weight" in capsys.readouterr().out
    assert train(*flags(**words, init_from=tmp_path / "first", save_model=tmp_path / "second")) == 0
    assert "fresh" not in capsys.readouterr().out
    other = [
        {"text": line["text"], "label": {"a": "cat", "b": "dog"}[line["label"]]} for line in lines(noise["val_file"])
    ]
    words = flags(
        model="gpt", task="classification", train_file=write_lines(tmp_path / "pets.jsonl", other), max_steps=1
    )
    assert train(*words, *flags(init_from=run, save_model=tmp_path / "pets")) == 0
    assert "newly initialized: score.weight" in capsys.readouterr().out


def test_a_head_for_more_labels_starts_fresh(tmp_path, noise, capsys):
    assert train(*flags(**noise, max_steps=2)) == 0
    rows = [{"text": f"{name} {n}", "label": "xyz"[n % 3]} for name in NAMES for n in range(9)]
    words = {
        "model": "gpt",
        "task": "classification",
        "train_file": write_lines(tmp_path / "b.jsonl", rows),
        "max_steps": 2,
    }
    assert train(*flags(**words, init_from=tmp_path / "run", save_model=tmp_path / "other")) == 0
    assert "newly initialized: score.weight" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "other").id2label == {0: "x", 1: "y", 2: "z"}


# ---- LoRA


def test_lora_is_what_peft_loads_and_merges(tmp_path, gpt):
    rows = [{"text": f"{name} {word}", "label": word} for name in NAMES for word in ("good", "bad", "fair")]
    data = write_lines(tmp_path / "a.jsonl", rows * 5)
    words = {
        "model": "gpt",
        "task": "classification",
        "init_from": gpt,
        "train_file": data,
        "val_file": data,
        "max_len": 16,
    }
    words |= {
        "batch_size": 6,
        "learning_rate": 5e-3,
        "save_freq": 20,
        "r": 8,
        "eval_freq": 100,
        "target_modules": "all-linear",
    }
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert train(*flags(**words, max_steps=100, save_model=run)) == 0
    assert evaluations(run)[-1]["val_accuracy"] == 1
    weights = load_file(run / "adapter_model.safetensors")
    assert sum(value.numel() for value in weights.values()) < 30000
    assert not (run / "model.safetensors").exists()
    assert train(*flags(**words, max_steps=100, save_model=merged), "--merge_lora") == 0
    assert not (merged / "adapter_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(run)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    config = AutoConfig.from_pretrained(run / "model_config.json")
    with torch.no_grad():
        base = AutoModelForSequenceClassification.from_pretrained(gpt, config=config)
        by_peft = PeftModel.from_pretrained(base, run).eval()(**inputs).logits
        by_auto = (
            AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=3, pad_token_id=config.pad_token_id)
            .eval()(**inputs)
            .logits
        )
        whole = AutoModelForSequenceClassification.from_pretrained(merged).eval()(**inputs).logits
    torch.testing.assert_close(by_auto, by_peft)
    torch.testing.assert_close(whole, by_peft, atol=1e-4, rtol=1e-4)
    said = [config.id2label[int(number)] for number in by_peft.argmax(-1)]
    assert said == [row["label"] for row in rows]
    assert predict(run, "--input", data, "--output", tmp_path / "said.jsonl") == 0
    assert [row["label"] for row in lines(tmp_path / "said.jsonl")] == said * 5
    judged = lambda folder: run_command(run / "recipe.yaml", "--eval_only", "--load_model", folder).stdout  # noqa: E731
    assert "accuracy 1.0000" in judged(run)
    assert "accuracy 1.0000" in judged(merged)


def test_lora_resumes_to_the_byte_and_generates(tmp_path, gpt):
    words = flags(
        model="gpt", task="instruction", init_from=gpt, max_len=64, batch_size=8, learning_rate=1e-2, max_steps=20
    )
    words += flags(
        train_file=instructions(tmp_path / "a.jsonl"), save_model=tmp_path / "run", r=4, save_freq=10, lora_dropout=0.1
    )
    words += ["--target_modules", "c_attn", "c_fc", "--gradient_checkpointing"]
    assert train(*words) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, other)
    (other / "adapter_model.safetensors").unlink()
    shutil.rmtree(other / "checkpoint-20")
    assert train(run / "recipe.yaml", "--init_from", "resume", "--save_model", other) == 0
    for name in ("adapter_model.safetensors", "checkpoint-20/trainer_state/optimizer.safetensors"):
        assert (other / name).read_bytes() == (run / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(run)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    said = run_command(
        run, "--prompt", "say anna, the oslo of", "--temperature", 0, "--max_new_tokens", 5, module="hf_myllm.generate"
    )
    assert said.stdout.startswith("say anna")
    # from an adapter, a new run goes on with the whole model
    assert (
        train(
            *flags(
                model="gpt",
                task="instruction",
                init_from=run,
                max_len=64,
                max_steps=2,
                train_file=tmp_path / "a.jsonl",
                save_model=tmp_path / "next",
            )
        )
        == 0
    )
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "next")).__name__ == "GPT2LMHeadModel"


def test_lora_is_refused_where_it_has_no_meaning(tmp_path, gpt, capsys):
    words = flags(
        train_file=instructions(tmp_path / "a.jsonl"),
        max_len=64,
        max_steps=2,
        task="instruction",
        save_model=tmp_path / "run",
    )
    for more, message in (
        (flags(tokenizer=BPE, r=4, **GPT), "lora needs a trained model to add to; give --init_from"),
        (flags(init_from=gpt, lora_alpha=4), "lora_alpha has no effect without LoRA; give --r 16"),
        (flags(init_from=gpt, r=4, target_modules="q_proj"), "lora: Target modules"),
        (flags(init_from=gpt, r=4, add_tokens="<x>"), "add_tokens needs trained embeddings"),
        (
            flags(init_from=gpt, r=4, vocab_size=400),
            "lora leaves the embeddings as they are, and the model lacks 108 rows",
        ),
        (flags(init_from=gpt, r=4, target_modules="wte"), "lora: transformer.wte shares its weight with another"),
        (flags(init_from=gpt, lora_dropout=0.1), "lora_dropout has no effect without LoRA"),
        ((*flags(init_from=gpt), "--merge_lora"), "merge_lora has no effect without LoRA"),
    ):
        assert train(*words, *more) == 2
        assert message in capsys.readouterr().err
    assert train(*words, *flags(init_from=gpt, r=4)) == 0
    run = tmp_path / "run"
    assert train(*words, *flags(init_from=run, r=4), "--save_model", tmp_path / "second") == 2
    assert "is an adapter itself: make a whole model of it first" in capsys.readouterr().err
    assert train(run / "recipe.yaml", "--init_from", "resume", "--max_steps", 4, "--r", 8, "--allow_changed") == 2
    assert "LoRA has other settings there: r was 4 and is 8" in capsys.readouterr().err
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert train(run / "recipe.yaml", "--eval_only", "--load_model", run) == 2
    assert "names it as base_model_name_or_path, and can be changed there" in capsys.readouterr().err


def test_lora_on_questions_reads_both_texts_and_goes_on(tmp_path):
    """peft's own class for questions forgets the token types, which tell question and text apart."""
    words = {
        "model": "bert",
        "task": "question_answering",
        **BERT,
        "max_len": 48,
        "batch_size": 8,
        "tokenizer": WORDPIECE,
    }
    words |= {
        "train_file": write_questions(tmp_path / "a.json", 60, 0),
        "val_file": write_questions(tmp_path / "b.json", 9, 1),
    }
    assert train(*flags(**words, max_steps=6, save_model=tmp_path / "base")) == 0
    for name in (*BERT, "tokenizer"):
        del words[name]
    words |= {"init_from": tmp_path / "base", "r": 4, "learning_rate": 1e-2, "save_freq": 5}
    assert train(*flags(**words, max_steps=10, save_model=tmp_path / "run")) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoint-10")
    (other / "adapter_model.safetensors").unlink()
    assert train(run / "recipe.yaml", "--init_from", "resume", "--save_model", other) == 0
    assert (other / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    assert train(*flags(**words, max_steps=10, save_model=tmp_path / "merged"), "--merge_lora") == 0
    assert evaluations(tmp_path / "merged")[-1] == evaluations(run)[-1]
    tokenizer = AutoTokenizer.from_pretrained(run)
    inputs = tokenizer("how many sheep?", "anna has 12 sheep.", return_tensors="pt")
    base = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(base, run).eval()(**inputs)
        whole = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()(**inputs)
    torch.testing.assert_close(by_peft.start_logits, whole.start_logits, atol=1e-5, rtol=1e-4)


def test_lora_on_every_module_leaves_the_head_whole(tmp_path, words_run):
    words = {
        "model": "bert",
        "task": "token_classification",
        "init_from": words_run / "run",
        "max_len": 16,
        "max_steps": 3,
    }
    words |= {
        "train_file": words_run / "train.conll",
        "val_file": words_run / "val.conll",
        "save_model": tmp_path / "run",
    }
    assert train(*flags(**words, r=2, target_modules="all-linear")) == 0
    names = set(load_file(tmp_path / "run" / "adapter_model.safetensors"))
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= names
    assert not any("classifier.lora" in name for name in names)
    assert predict(tmp_path / "run", "--input", words_run / "val.conll", "--output", tmp_path / "out.jsonl") == 0
    # a head for other labels, in the adapter alone
    (tmp_path / "other.conll").write_text("anna B-X\nrome B-Y\n\noslo O\nlima I-Y\n\n" * 9)
    words |= {
        "train_file": tmp_path / "other.conll",
        "val_file": tmp_path / "other.conll",
        "save_model": tmp_path / "other",
    }
    assert train(*flags(**words, r=2)) == 0
    assert predict(tmp_path / "other", "--input", tmp_path / "other.conll", "--output", tmp_path / "out.jsonl") == 0
    assert set(lines(tmp_path / "out.jsonl")[0]["labels"]) <= {"B-X", "B-Y", "I-Y", "O"}


def test_a_sample_changes_nothing_that_is_saved(tmp_path, gpt):
    words = flags(model="gpt", task="instruction", init_from=gpt, max_len=64, r=4, max_steps=3, max_new_tokens=3)
    words += flags(train_file=instructions(tmp_path / "a.jsonl"), eval_freq=2, save_freq=1)
    for name, more in (("sampled", flags(start_context="say")), ("silent", [])):
        assert train(*words, *more, "--save_model", tmp_path / name) == 0
    said = [(tmp_path / name / "generation_config.json").read_text() for name in ("sampled", "silent")]
    assert said[0] == said[1]
    assert json.loads(said[0])["eos_token_id"] is not None


def test_a_merged_model_is_made_again_where_it_was_not(tmp_path, gpt):
    words = flags(model="gpt", task="instruction", init_from=gpt, max_len=64, r=4, save_model=tmp_path / "run")
    words += [*flags(train_file=instructions(tmp_path / "a.jsonl"), max_steps=3, learning_rate=1e-2), "--merge_lora"]
    assert train(*words) == 0
    weights, run = (tmp_path / "run" / "model.safetensors").read_bytes(), tmp_path / "run"
    shutil.copy(gpt / "model.safetensors", run / "model.safetensors")  # as of another step
    assert train(run / "recipe.yaml", "--init_from", "resume") == 0
    assert (run / "model.safetensors").read_bytes() == weights


def test_masked_lm_takes_lora_where_it_has_its_head(tmp_path, capsys):
    text = write_lines(
        tmp_path / "text.jsonl", [{"text": f"{name} sees {place}"} for name in NAMES for place in PLACES]
    )
    words = {"model": "bert", "train_file": text, "max_len": 16, "max_steps": 4, "val_fraction": 0.2}
    assert train(*flags(**words, **BERT, tokenizer=WORDPIECE, save_model=tmp_path / "mlm")) == 0
    assert train(*flags(**words, init_from=tmp_path / "mlm", r=2, save_model=tmp_path / "run")) == 0
    loss = evaluations(tmp_path / "run")[-1]["val_loss"]
    capsys.readouterr()
    assert train(tmp_path / "run" / "recipe.yaml", "--eval_only", "--load_model", tmp_path / "run") == 0
    assert f"validation loss {loss:.4f}" in capsys.readouterr().out
    pairs = {"model": "bert", "task": "mlm_nsp", "train_file": text, "max_len": 16, "max_steps": 4, "document": "line"}
    assert train(*flags(**pairs, init_from=tmp_path / "mlm", r=2, save_model=tmp_path / "pairs")) == 2
    assert "lora needs a model that has the head of task mlm_nsp" in capsys.readouterr().err


# ---- predictions


def test_predictions_of_plain_lines_and_bad_rows(tmp_path, noise, capsys, words_run):
    assert train(*flags(**noise, max_steps=2)) == 0
    run = tmp_path / "run"
    (tmp_path / "lines.txt").write_text("anna 3 oslo\n\nboris\n")
    capsys.readouterr()
    assert predict(run, "--input", tmp_path / "lines.txt", "--batch_size", 1) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["anna 3 oslo", "boris"]
    cut = pipeline("text-classification", str(run))("anna " * 99, truncation=True, batch_size=2)  # it knows where
    assert cut[0]["label"] in "ab"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(run).eval(),
        AutoTokenizer.from_pretrained(run),
    )
    for row in rows:
        chances = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert row["scores"] == pytest.approx({"a": chances[0].item(), "b": chances[1].item()}, abs=1e-5)
        assert row["label"] == max(row["scores"], key=row["scores"].get)
        assert row["score"] == max(row["scores"].values())
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": "anna"}, {"text": 3}, {"no": "text"}])
    assert predict(run, "--input", bad, "--output", tmp_path / "out.jsonl") == 2
    assert "bad.jsonl line 2: column 'text' does not hold text: 3" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.jsonl*"))  # nothing half-written
    assert predict(run, "--input", bad, "--output", tmp_path / "out.jsonl", "--skip_bad_rows") == 0
    assert "1 rows judged, 2 left out" in capsys.readouterr().err
    for arguments, message in (
        ((tmp_path / "nowhere", "--input", bad), "is not a folder"),
        ((run, "--input", tmp_path / "missing.csv"), "missing.csv does not exist"),
        ((run, "--input", bad, "--max_len", 10**6), "--max_len must be from 4 to 32"),
        ((run, "--input", bad, "--output", bad), "is the input: name another file"),
        ((run, "--input", bad, "--output", tmp_path / "no" / "out"), "cannot be written"),
        ((words_run / "run", "--input", bad), "line 1 has no column 'tokens'"),
    ):
        assert predict(*arguments) == 2
        assert message in capsys.readouterr().err
    assert run_command(run, "--prompt", "x", module="hf_myllm.generate").returncode == 2  # it writes no text


def test_predictions_need_a_model_that_judges(gpt, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x\n")
    assert predict(gpt, "--input", tmp_path / "a.txt") == 2
    assert (
        "GPT2LMHeadModel, which makes no predictions; to generate text: python -m hf_myllm.generate"
        in capsys.readouterr().err
    )
    assert os.environ["HF_HUB_OFFLINE"] == "1"
