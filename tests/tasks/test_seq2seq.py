"""Sequence to sequence: columns, rows, batches, loss, generated evaluation and predictions."""

import itertools
import json
import random
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import small_runs as runs
import torch
from conftest import plain_run, read_weights, train
from families import CASES
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_myllm import evaluation, tasks
from hf_myllm.data import sources
from hf_myllm.data import tokenizer as tokenizers
from hf_myllm.errors import InputError
from hf_myllm.tasks import IGNORE_INDEX, seq2seq
from hf_myllm.tasks.labelled_rows import load_rows

ROWS = [{"source": "abc def " * (n % 5 + 1) + str(n), "target": f"{n} words"} for n in range(30)]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train("bpe", [row["source"] for row in ROWS] * 3, 300, tasks.TASKS["seq2seq"].new_tokens)


def write_source(folder, rows, name="a.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.file_source(str(folder / name))


def make_task(tokenizer, max_len=64, **settings):
    task = tasks.build("seq2seq", tokenizer, settings)
    task.configure(SimpleNamespace(vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id), max_len)
    return task


def texts_of(rows, tokenizer):
    """Return the sources and the targets of all rows, without special tokens."""
    pairs = []
    for index in range(len(rows)):
        ids, start = rows.read(index)
        pairs.append(tuple(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:])))
    return pairs


# ---- rows


def test_rows_are_sources_and_targets_with_their_end(tmp_path, bpe):
    task = make_task(bpe, source_prefix="say: ")
    rows, _ = load_rows(write_source(tmp_path, ROWS), task)
    assert texts_of(rows, bpe) == [("say: " + row["source"], row["target"]) for row in ROWS]
    assert [record["target"] for record in rows.records] == [row["target"] for row in ROWS]
    for index in range(len(rows)):
        ids, start = rows.read(index)
        assert ids[start - 1] == ids[-1] == bpe.eos_token_id
    batch = task.batch(rows, np.array([4, 0]), size=3)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for row, index in enumerate((4, 0)):
        ids, start = rows.read(index)
        assert batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist() == ids[:start].tolist()
        assert batch["labels"][row][batch["labels"][row] != IGNORE_INDEX].tolist() == ids[start:].tolist()
    assert (batch["labels"][2] == IGNORE_INDEX).all()
    assert task.count_targets(batch) == {"num_items_in_batch": int((batch["labels"] != IGNORE_INDEX).sum())}
    assert task.count_tokens(batch) == sum(len(rows.read(index)[0]) for index in (4, 0))


def test_real_tokenizers_give_the_rows_of_stock_fine_tuning(tmp_path, assets):
    for name, max_len, max_target_len in (("t5", 20, 5), ("bart", 12, 6)):
        tokenizer = tokenizers.load(str(assets / "tokenizers" / name))
        task = make_task(tokenizer, max_len, max_target_len=max_target_len)
        rows, _ = load_rows(write_source(tmp_path, ROWS), task)
        for index, row in enumerate(ROWS):
            ids, start = rows.read(index)
            expected = tokenizer(row["source"], truncation=True, max_length=max_len)["input_ids"]
            assert ids[:start].tolist() == expected
            target = tokenizer(text_target=row["target"], truncation=True, max_length=max_target_len)["input_ids"]
            assert ids[start:].tolist() == target


def test_rows_of_a_step_have_similar_sources_and_targets(tmp_path, bpe):
    task = make_task(bpe)
    rows, _ = load_rows(write_source(tmp_path, ROWS), task)
    indices, lengths = np.arange(len(rows)), rows.lengths(np.arange(len(rows)))
    order = np.argsort(task.length_keys(rows)(indices))
    pairs = list(zip(rows.second_text[order], (lengths - rows.second_text)[order], strict=True))
    assert pairs == sorted(pairs)
    batch = task.batch(rows, order[:3])
    assert batch["input_ids"].shape[1] == pairs[2][0]  # no more padding than the rows need
    assert batch["labels"].shape[1] == max(target for _, target in pairs[:3])


def test_a_lowered_max_target_len_is_reported(tmp_path, bpe):
    task = make_task(bpe, max_target_len=40)
    rows, _ = load_rows(write_source(tmp_path, ROWS), task)
    task.max_target_len = 30
    assert task.summary_lines(rows, None, rows.stats)[0] == (
        "max_target_len 40 is lowered to 30, the model's positions"
    )


def test_too_long_texts_are_cut_and_counted(tmp_path, bpe):
    task = make_task(bpe, max_len=6, max_target_len=4)
    rows, _ = load_rows(write_source(tmp_path, ROWS), task)
    longer = {name: sum(len(bpe(row[name])["input_ids"]) > limit for row in ROWS)
              for name, limit in (("source", 6), ("target", 4))}  # fmt: skip
    assert 0 < longer["source"] < 30
    assert task.summary_lines(rows, None, rows.stats) == [
        f"{longer['source']} sources longer than max_len 6: cut",
        f"{longer['target']} targets longer than max_target_len 4: cut",
    ]
    for index in range(len(rows)):
        ids, start = rows.read(index)
        assert start <= 6
        assert len(ids) - start <= 4
        assert ids[start - 1] == ids[-1] == bpe.eos_token_id


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "a b", "completion": "c", "id": 3}, {}),
        ({"document": "a b", "summary": "c"}, {}),
        ({"article": "a b", "highlights": "c", "id": "x"}, {}),
        ({"translation": {"en": "a b", "de": "c"}}, {"text_column": "en", "target_column": "de"}),
        ({"question": "a b", "answer": "c"}, {"text_column": "question", "target_column": "answer"}),
        ({"text": "x", "summary": "c", "body": "a b"}, {"text_column": "body", "target_column": "summary"}),
        ({"text": "x", "document": "a b", "summary": "c"}, {"text_column": "document"}),
    ],
)
def test_columns_are_found_by_their_usual_names(tmp_path, bpe, row, settings):
    data = datasets.Dataset.from_list([row, row])
    for source in (write_source(tmp_path, [row, row]), sources.in_memory_source(data, "train_data", "text", "file")):
        rows, _ = load_rows(source, make_task(bpe, **settings))
        assert texts_of(rows, bpe) == [("a b", "c")] * 2


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"source": "a", "target": None}, {}, "line 2: the target, column 'target', is empty"),
        ({"source": "a", "target": ""}, {}, "line 2: the target, column 'target', is empty"),
        ({"source": " ", "target": "b"}, {}, "line 2: the source, column 'source', is empty"),
        ({"source": 7, "target": "b"}, {}, "line 2: column 'source' does not hold text: 7"),
        ({"source": "a", "target": ["b"]}, {}, "line 2: column 'target' does not hold text: "),
        ({"source": "a"}, {}, "line 2 has the columns 'source'; name those of the source"),
        ({"source": "a"}, {"text_column": "source"}, "line 2 has the columns 'source'; name those of the source"),
        ({"a": "a", "b": "b"}, {"text_column": "a", "target_column": "c"}, "line 2 has no column 'c', but 'a', 'b'"),
        ({"translation": {"en": "a", "de": "b"}}, {}, "line 2 has the columns 'en', 'de'; name those of the source"),
    ],
)
def test_rows_that_cannot_be_used_are_named_by_their_line(tmp_path, bpe, row, settings, message):
    names = settings.get("text_column", "source"), settings.get("target_column", "target")
    good = {name: "text" for name in names}
    with pytest.raises(InputError, match=message):
        load_rows(write_source(tmp_path, [good, row]), make_task(bpe, **settings))
    rows, _ = load_rows(write_source(tmp_path, [good, row, good]), make_task(bpe, skip_bad_rows=True, **settings))
    assert (len(rows), rows.stats["skipped"]) == (2, 1)


def test_the_same_source_does_not_stand_on_both_sides(tmp_path, bpe):
    source = write_source(tmp_path, [{"source": f"text {n % 20}", "target": f"{n}"} for n in range(100)])
    training, held_out = load_rows(source, make_task(bpe), 0.2)
    first, second = ({source for source, _ in texts_of(rows, bpe)} for rows in (training, held_out))
    assert len(first) + len(second) == 20
    assert second
    assert not first & second


# ---- metrics


def test_edit_distance():
    for first, second, expected in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2)):
        assert seq2seq.edit_distance(list(map(ord, first)), list(map(ord, second))) == expected
    draw = random.Random(0)
    for _ in range(50):
        first, second = ([draw.randint(0, 3) for _ in range(draw.randint(0, 9))] for _ in range(2))
        table = {(i, 0): i for i in range(10)} | {(0, j): j for j in range(10)}
        for i, j in itertools.product(range(1, len(first) + 1), range(1, len(second) + 1)):
            replaced = table[i - 1, j - 1] + (first[i - 1] != second[j - 1])
            table[i, j] = min(replaced, table[i - 1, j] + 1, table[i, j - 1] + 1)
        assert seq2seq.edit_distance(first, second) == table[len(first), len(second)]


def test_metrics_are_those_of_the_libraries():
    sacrebleu, rouge = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    predictions = ["the cat sat on the mat .", "a dog barks loudly at me", " same words here "]
    references = ["the cat is on the mat .", "the dogs bark loudly at night", "same words here"]
    metrics = seq2seq.text_metrics(predictions, references, [[1, 2], [3], [4]], [[1], [3], [5, 6]])
    assert metrics["exact_match"] == 1 / 3
    assert metrics["token_error_rate"] == (1 + 0 + 2) / 4
    assert metrics["generated_rows"] == 3
    assert metrics["bleu"] == sacrebleu.BLEU().corpus_score(predictions, [references]).score
    assert metrics["chrf"] == sacrebleu.CHRF().corpus_score(predictions, [references]).score
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, predictions, strict=True)]
    assert metrics["rougeL"] == pytest.approx(np.mean(scores), abs=1e-12)


def test_without_the_libraries_two_metrics_are_left(monkeypatch, bpe):
    monkeypatch.setattr(seq2seq, "_HAS_LIBRARIES", False)
    metrics = seq2seq.text_metrics(["a"], ["a"], [[1]], [[1]])
    assert metrics == {"exact_match": 1.0, "token_error_rate": 0.0, "generated_rows": 1}
    task = make_task(bpe)
    assert task.summary_lines(None, [1], {}) == ['ROUGE, BLEU and chrF need: pip install "hf-myllm[text-metrics]"']
    assert task.describe_metrics(metrics | {"loss": 1.0}) == "exact match 100.0%, token errors 0.0% of 1 generated row"


# ---- generated predictions


@pytest.fixture
def generator(tmp_path, bpe):
    """Return a task, the rows of a file, and a stock T5 with random weights that generates texts of its own."""
    task = make_task(bpe, max_target_len=12)
    rows, _ = load_rows(write_source(tmp_path, ROWS), task)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": bpe.pad_token_id, "decoder_start_token_id": bpe.pad_token_id}
    config = T5Config(vocab_size=len(bpe), eos_token_id=bpe.eos_token_id, **tokens, **sizes)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the initial weights, by which it repeats one token
            parameter.normal_(std=0.5)
    return SimpleNamespace(task=task, rows=rows, model=model.train())


def fake_rank(rank, world_size):
    names = {"process_index": rank, "num_processes": world_size, "is_fsdp2": False, "device": torch.device("cpu")}
    return SimpleNamespace(**names, unwrap_model=lambda model, keep_torch_compile: model)


def test_groups_have_rows_of_equal_length_and_every_row_once():
    lengths = np.array([3, 5, 3, 3, 5, 1, 3])
    groups = seq2seq.equal_length_groups(lengths, np.array([0, 1, 2, 3, 4, 6]), 3)
    assert [group.tolist() for group in groups] == [[1, 4], [0, 2, 3], [6]]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_texts_are_those_of_stock_rows_alone_on_any_number_of_ranks(generator, bpe, monkeypatch, num_beams):
    task, rows, model, indices = generator.task, generator.rows, generator.model, np.arange(12)
    task.settings.num_beams = num_beams
    gathered = evaluation.generate_rows(plain_run(task, fake_rank(0, 1), 4), model, rows, indices)
    assert model.training
    texts = dict(gathered)
    assert len(set(texts.values())) > 3
    for row in indices:
        ids, start = rows.read(int(row))
        options = {"num_beams": num_beams, "max_new_tokens": 11, "do_sample": False}
        (output,) = model.eval().generate(torch.from_numpy(ids[None, :start]), **options)
        assert texts[row] == bpe.decode(output, skip_special_tokens=True)
    monkeypatch.setattr(evaluation, "gather", lambda accelerator, predictions: [predictions])
    runs = [plain_run(task, fake_rank(rank, 3), 4) for rank in range(3)]
    shares = [evaluation.generate_rows(run, model, rows, indices) for run in runs]
    assert all(shares)
    assert dict(itertools.chain(*shares)) == texts
    assert sum(map(len, shares)) == len(indices)


def test_generation_starts_as_the_class_does_in_training(generator, bpe):
    """T5 starts from decoder_start_token_id, mBART from the last token of the target, whatever its configuration."""
    tokens = {"pad_token_id": bpe.pad_token_id, "eos_token_id": bpe.eos_token_id, "decoder_start_token_id": 5}
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    model = MBartForConditionalGeneration(MBartConfig(vocab_size=len(bpe), d_model=32, **layers, **tokens))
    assert generator.task.generation_config(generator.model).decoder_start_token_id == bpe.pad_token_id
    assert generator.task.generation_config(model).decoder_start_token_id == bpe.eos_token_id
    blenderbot = SimpleNamespace(generation_config=GenerationConfig())  # whose class has no method for it
    assert generator.task.generation_config(blenderbot).decoder_start_token_id == bpe.pad_token_id
    generator.task.update_generation_config(model, {})
    assert model.generation_config.decoder_start_token_id == bpe.eos_token_id


def test_an_evaluation_generates_a_limited_number_of_rows(generator, monkeypatch):
    task, rows, generated = generator.task, generator.rows, []
    monkeypatch.setattr(
        task, "generate", lambda model, rows, group: generated.extend(group) or ["5 words"] * len(group)
    )
    monkeypatch.setattr(task, "forward", lambda model, inputs, counts: SimpleNamespace(loss=torch.tensor(1.0)))
    arguments = plain_run(task, fake_rank(0, 1), 4), generator.model, rows, np.arange(len(ROWS))
    metrics = evaluation.evaluate_rows(*arguments, max_generated=10)
    assert sorted(generated) == list(range(0, 30, 3))
    assert metrics["generated_rows"] == 10
    assert metrics["exact_match"] == 0.0
    assert evaluation.evaluate_rows(*arguments)["exact_match"] == 1 / 30
    assert "exact_match" not in evaluation.evaluate_rows(*arguments, with_predictions=False)

    def stop(done, total):
        if len(generated) > 45:
            raise evaluation.EvaluationStopped

    with pytest.raises(evaluation.EvaluationStopped):
        evaluation.evaluate_rows(*arguments, stop)
    assert generator.model.training


# ---- with our models


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_loss_is_that_of_the_stock_class(tmp_path, bpe, family):
    tokens = {"vocab_size": len(bpe), "pad_token_id": bpe.pad_token_id, "decoder_start_token_id": bpe.eos_token_id}
    ours, stock = CASES[family].make_pair(tmp_path / "model", **tokens)
    task = make_task(bpe, max_target_len=6, label_smoothing=0.2)
    rows, _ = load_rows(write_source(tmp_path, ROWS), task)
    batch = task.batch(rows, np.arange(7), size=8)
    counts = {"num_items_in_batch": 2 * task.count_targets(batch)["num_items_in_batch"]}
    known = {name: values[:7] for name, values in batch.items()}
    expected = stock(**known)
    torch.testing.assert_close(task.forward(ours, batch, counts).loss * 2, expected.loss)
    logits, labels = expected.logits, known["labels"]
    smoothed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(task.forward(ours.train(), batch, counts).loss * 2, smoothed)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Return the settings of a run that learns to copy a word, as a summary of two."""
    folder, draw = tmp_path_factory.mktemp("copies"), random.Random(0)
    words = ["".join(draw.choice("abcd") for _ in range(draw.randint(1, 3))) for _ in range(200)]
    rows = [{"document": f"{word} {draw.choice(words)}", "summary": word} for word in words]
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return {
        **{"model": "t5", "task": "seq2seq", "tokenizer": runs.BPE, "max_len": 16, "max_target_len": 8, **sizes},
        **{"train_file": runs.write_lines(folder / "train.jsonl", rows), "val_fraction": 0.1, "max_steps": 8},
        **{"batch_size": 16, "learning_rate": 1e-2, "eval_freq": 4, "metric_for_best": "token_error_rate"},
        **{"source_prefix": "first: ", "start_context": "ab cd", "save_freq": 4, "label_smoothing": 0.1},
    }


def test_a_run_evaluates_resumes_and_predicts_as_the_stock_class(copies, tmp_path, capsys):
    flags, run, cut = runs.flags(**copies), tmp_path / "run", tmp_path / "cut"
    assert train(*flags, "--save_model", run) == 0
    out = capsys.readouterr().out
    assert "of 20 generated rows" in " ".join(out.split())
    first, second = runs.evaluations(run)[-2:]
    assert second["val_loss"] < first["val_loss"]
    for line in (first, second):
        assert {"val_rouge2", "val_bleu", "val_chrf", "val_exact_match", "val_token_error_rate", "sample"} <= set(line)
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "checkpoint-8")
    (cut / "model.safetensors").unlink()
    assert train(*flags, "--save_model", cut, "--init_from", "resume") == 0
    assert read_weights(cut) == read_weights(run)
    assert train(*flags, "--save_model", run, "--init_from", "resume", "--source_prefix", "other: ") == 2
    assert "source_prefix was 'first: ' and is 'other: '" in capsys.readouterr().err

    rows = [{"document": text} for text in ("ab cd", "d", "abcd dcba")] + [{"document": "a b", "summary": "a"}]
    assert runs.predict(run, "--input", runs.write_lines(tmp_path / "in.jsonl", rows), "--num_beams", 2) == 0
    out, err = capsys.readouterr()
    assert "generated_rows    1" in err
    tokenizer, model = AutoTokenizer.from_pretrained(run), AutoModelForSeq2SeqLM.from_pretrained(run)
    for row, line in zip(rows, map(json.loads, out.splitlines()), strict=True):
        source = tokenizer("first: " + row["document"], return_tensors="pt")
        expected = model.generate(**source, num_beams=2)[0]  # its own generation_config has the limit
        assert line == row | {"prediction": tokenizer.decode(expected, skip_special_tokens=True)}
    for flag, message in (("--num_beams", "0 is out of range"), ("--label_column", "unrecognized arguments")):
        assert runs.predict(run, "--input", tmp_path / "in.jsonl", flag, 0) == 2
        assert message in capsys.readouterr().err
    assert runs.generate(run, "--prompt", "ab", "--chat") == 2
    assert "--chat: it has no effect, because an encoder-decoder reads a text" in capsys.readouterr().err


def test_lengths_without_room_for_a_token_are_refused(bpe):
    for settings, message in (({"max_len": 1}, "max_len 1 is too"), ({"max_target_len": 1}, "max_target_len 1 is too")):
        with pytest.raises(InputError, match=message):
            make_task(bpe, **settings)


def test_a_decoder_is_told_to_use_instruction(tiny, capsys):
    assert train(*tiny(task="seq2seq")) == 2
    assert "not a task of gpt; choose instruction, with prompt and completion" in capsys.readouterr().err
