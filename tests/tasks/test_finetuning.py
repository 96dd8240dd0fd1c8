"""Fine-tuned models of each task agree with stock transformers."""

import json

import lm_eval
import numpy as np
import pytest
import torch
from conftest import ROOT, train
from lm_eval.tasks import TaskManager
from seqeval.metrics import f1_score
from small_runs import (
    BERT,
    DROPOUT,
    NAMES,
    WORDPIECE,
    evaluations,
    flags,
    generate,
    predict,
    read_lines,
    write_instructions,
    write_lines,
    write_questions,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from hf_myllm.reporting.console import format_loss


def test_the_sms_spam_recipe_detects_spam(tmp_path, assets):
    data = assets / "tasks" / "sms_spam"
    settings = {"train_file": data / "train_data.csv", "val_file": data / "test_data.csv", "text_column": "message"}
    settings |= {"max_steps": 120, "warmup_steps": 50, "eval_freq": 1000, "save_model": tmp_path / "run"}
    assert train(ROOT / "recipes" / "sms_spam_gpt.yaml", *flags(**settings)) == 0
    assert evaluations(tmp_path / "run")[-1]["val_f1"] > 0.85  # at least 0.967 after all epochs of the recipe


def test_entities_are_found_and_stock_transformers_agrees(entities_run, capsys):
    run = entities_run / "run"
    model, loading = AutoModelForTokenClassification.from_pretrained(run, output_loading_info=True)
    assert type(model).__name__ == "BertForTokenClassification"
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    tokenizer, names = AutoTokenizer.from_pretrained(run), model.config.id2label
    sentences = [
        [line.split() for line in block.splitlines()]
        for block in (entities_run / "val.conll").read_text().split("\n\n")
    ]
    expected, predicted = [], []
    for sentence in filter(None, sentences):
        words, labels = zip(*sentence, strict=True)
        # each piece has as many words as fit into 16 tokens; the first token of a word has its label
        labels_here, begin = [], 0
        while begin < len(words):
            end = len(words)
            while len(tokenizer(list(words[begin:end]), is_split_into_words=True)["input_ids"]) > 16:
                end -= 1
            coded = tokenizer(list(words[begin:end]), is_split_into_words=True, return_tensors="pt")
            with torch.no_grad():
                best = model.eval()(**coded).logits[0].argmax(-1).tolist()
            word_ids = coded.word_ids()
            labels_here += [names[best[word_ids.index(word)]] for word in range(end - begin)]
            begin = end
        expected.append(list(labels))
        predicted.append(labels_here)
    metrics = evaluations(run)[-1]
    assert metrics["val_f1"] == pytest.approx(f1_score(expected, predicted))
    assert metrics["val_f1"] > 0.8
    assert "val_perplexity" not in metrics
    assert predict(run, "--input", entities_run / "val.conll", "--output", entities_run / "predictions.jsonl") == 0
    rows = read_lines(entities_run / "predictions.jsonl")
    assert [row["labels"] for row in rows] == predicted
    entity = rows[0]["entities"][0]
    assert entity["type"] in ("PER", "LOC")
    assert entity["text"] == " ".join(rows[0]["tokens"][entity["first"] : entity["last"] + 1])
    groups = pipeline("token-classification", str(run), aggregation_strategy="simple")("with carla borisov")
    assert groups[0]["entity_group"] == "PER"
    outputs = set()
    for size in (1, 7, 64):
        capsys.readouterr()
        assert train(run / "recipe.yaml", "--eval_only", "--load_model", run, "--batch_size", size) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1
    assert f"f1 {metrics['val_f1']:.4f}" in outputs.pop()


def test_labels_without_entities_are_evaluated_word_by_word(tmp_path):
    rows = [{"tokens": ["a", "bb", "a"][: n % 3 + 1], "label": ["DET", "NOUN", "DET"][: n % 3 + 1]} for n in range(60)]
    settings = {
        "model": "bert",
        "task": "token_classification",
        **BERT,
        "tokenizer": "{train: wordpiece, vocab_size: 100}",
    }
    settings |= {"train_file": write_lines(tmp_path / "a.jsonl", rows), "max_len": 16, "save_model": tmp_path / "run"}
    assert train(*flags(**settings, max_steps=2, val_fraction=0.2)) == 0
    assert {"val_accuracy", "val_f1_macro"} <= set(evaluations(tmp_path / "run")[-1])
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab()
    assert "bb" in vocabulary
    assert not any("DET" in token for token in vocabulary)
    (tmp_path / "lines.txt").write_text("a bb a\nbb\n")
    assert predict(tmp_path / "run", "--input", tmp_path / "lines.txt", "--output", tmp_path / "out.jsonl") == 0
    assert [row["tokens"] for row in read_lines(tmp_path / "out.jsonl")] == [["a", "bb", "a"], ["bb"]]


@pytest.mark.parametrize("unanswerable", [False, True])
def test_answers_are_found_and_stock_transformers_agrees(tmp_path, unanswerable, capsys):
    settings = {"model": "bert", "task": "question_answering", **BERT, **DROPOUT, "max_len": 48, "batch_size": 16}
    settings |= {"train_file": write_questions(tmp_path / "train.json", 250, 0, unanswerable), "learning_rate": 5e-3}
    settings |= {
        "val_file": write_questions(tmp_path / "val.json", 41, 1, unanswerable),
        "save_model": tmp_path / "run",
    }
    settings["tokenizer"] = WORDPIECE
    assert train(*flags(**settings, epochs=6, warmup_steps=20)) == 0
    run, metrics = tmp_path / "run", evaluations(tmp_path / "run")[-1]
    assert metrics["val_exact_match"] > 0.8
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(run).eval(), AutoTokenizer.from_pretrained(run)
    assert type(model).__name__ == "BertForQuestionAnswering"
    right = count = 0
    for article in json.loads((tmp_path / "val.json").read_text())["data"]:
        context, (qas,) = article["paragraphs"][0]["context"], article["paragraphs"][0]["qas"]
        coded = tokenizer(qas["question"], context, return_tensors="pt", return_offsets_mapping=True)
        offsets = coded.pop("offset_mapping")[0].tolist()
        if len(offsets) > 48:  # several rows: see test_labelled.py
            continue
        with torch.no_grad():
            outputs = model(**coded)
        best, answer = -np.inf, None
        inside = [token for token, sequence in enumerate(coded.sequence_ids(0)) if sequence == 1]
        for a in inside:
            for b in inside:
                score = (outputs.start_logits[0, a] + outputs.end_logits[0, b]).item()
                if a <= b < a + 30 and score > best:
                    best, answer = score, context[offsets[a][0] : offsets[b][1]]
        if unanswerable and (outputs.start_logits[0, 0] + outputs.end_logits[0, 0]).item() > best:
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
    # a checkpoint uses the recipe of its run
    output = tmp_path / "checkpoint.jsonl"
    (checkpoint,) = run.glob("checkpoint-*")
    assert predict(checkpoint, "--input", tmp_path / "val.json", "--output", output) == 0
    assert read_lines(output) == rows
    for size in (1, 5):
        capsys.readouterr()
        assert train(run / "recipe.yaml", "--eval_only", "--load_model", run, "--batch_size", size) == 0
        assert f"validation loss {format_loss(metrics['val_loss'])}" in capsys.readouterr().out
    assert f"unanswerable: {str(unanswerable).lower()}" in (run / "recipe.yaml").read_text()


def predictions(folder):
    output = folder / "predictions.jsonl"
    if not output.exists():
        assert predict(folder / "run", "--input", folder / "val.json", "--output", output) == 0
    return read_lines(output)


def test_instructions_are_followed_and_lm_eval_agrees(tmp_path, gpt):
    settings = flags(
        model="gpt", task="instruction", init_from=gpt, max_len=64, batch_size=8, learning_rate=5e-3, epochs=40
    )
    settings += flags(
        train_file=write_instructions(tmp_path / "a.jsonl"),
        save_model=tmp_path / "run",
        start_context="say carla, the oslo of",
        max_new_tokens=9,
        temperature=0,
    )
    assert train(*settings) == 0
    last = evaluations(tmp_path / "run")[-1]
    assert last["sample"] == "say carla, the oslo of CARLA"  # where generation ends
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
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'run'}",
        tasks=["say"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
    )
    assert results["results"]["say"]["acc,none"] == 1


def test_a_chat_template_from_a_file_is_saved_with_the_model(tmp_path, gpt):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [[{"role": "user", "content": name}, {"role": "assistant", "content": name.upper()}] for name in NAMES]
    data = write_lines(tmp_path / "a.jsonl", [{"messages": turn} for turn in turns * 10])
    settings = flags(
        model="gpt",
        task="instruction",
        init_from=gpt,
        max_len=64,
        max_steps=2,
        train_file=data,
        save_model=tmp_path / "run",
    )
    assert train(*settings) == 2  # the tokenizer has none
    assert train(*settings, "--chat_template", tmp_path / "chat.jinja") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.apply_chat_template(turns[0], tokenize=False) == "user: anna\nassistant: ANNA\n"
    assert train(tmp_path / "run" / "recipe.yaml", "--init_from", "resume", "--max_steps", 4, "--allow_changed") == 0


def test_a_chat_ends_where_its_template_ends_a_turn(tmp_path, gpt, capsys):
    """The end of a turn is not the tokenizer's end of text; stock generation stops there too."""
    (tmp_path / "chatml.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(gpt)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    turns = [[{"role": "user", "content": name}, {"role": "assistant", "content": f"say {name}"}] for name in NAMES]
    data, val_data = (
        write_lines(tmp_path / f"{count}.jsonl", [{"messages": turn} for turn in turns * count]) for count in (20, 19)
    )
    settings = flags(
        model="gpt", task="instruction", init_from=gpt, max_len=48, epochs=25, learning_rate=5e-3, batch_size=8
    )
    settings += flags(
        tokenizer=tmp_path / "tokenizer", vocab_size=len(tokenizer), chat_template=tmp_path / "chatml.jinja"
    )
    assert train(*settings, *flags(train_file=data, val_file=val_data, save_model=tmp_path / "run")) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    capsys.readouterr()
    assert generate(tmp_path / "run", "--chat", "--prompt", "carla", "--temperature", 0) == 0
    assert capsys.readouterr().out.strip() == "say carla"
    chat = pipeline("text-generation", str(tmp_path / "run"))(turns[2][:1], do_sample=False, max_new_tokens=30)
    assert chat[0]["generated_text"][-1]["content"].strip() == "say carla"
    assert generate(gpt, "--chat", "--prompt", "x") == 2  # without a template
