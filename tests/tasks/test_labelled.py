"""Labelled examples: each label at its token, and each mistake named by its place."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_myllm.data import sources, tokenizer
from hf_myllm.errors import InputError
from hf_myllm.generate import encode_prompt
from hf_myllm.tasks import IGNORE_INDEX, LabelledTexts, Labels
from hf_myllm.tasks.classification import Classification
from hf_myllm.tasks.instruction import Instruction
from hf_myllm.tasks.labelled_rows import load_rows
from hf_myllm.tasks.question_answering import QuestionAnswering
from hf_myllm.tasks.token_classification import TokenClassification, find_scheme

ROWS = [{"text": f"text number {n} " * (n % 7 + 1), "other": f"pair {n}", "label": n % 3} for n in range(50)]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def wordpiece():
    return tokenizer.train_wordpiece([row["text"] + row["other"] for row in ROWS] * 3, 120)


@pytest.fixture
def bpe():
    return tokenizer.train_bpe(["<user>hello there\n<assistant>well met, stranger\n"] * 5, 300)


def write_source(folder, rows, name="a.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.file_source(str(folder / name))


def find_labels(task, source):
    task.find_labels(source, None, False)
    return task.labels


def whole_batch(task, rows):
    task.configure(SimpleNamespace(pad_token_id=task.tokenizer.pad_token_id, type_vocab_size=2), task.max_len)
    return task.batch(rows, np.arange(len(rows)), size=len(rows) + 2)


# ---- classes


class FixedLogits(torch.nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize("given", ["balanced", {"ham": 0.5, "spam": 1.5, "unseen": 9.0}])
def test_class_weights_and_label_smoothing(tmp_path, wordpiece, given):
    """They change the loss of training only, and keep its scale."""
    rows = [{"text": f"text {n}", "label": "spam" if n % 4 == 0 else "ham"} for n in range(40)]
    source, names = write_source(tmp_path, rows), ["unseen", "spam", "ham"]
    settings = {"class_weights": given, "label_smoothing": 0.1, "labels": names, "max_len": 20}
    task = Classification(wordpiece, **settings)
    assert find_labels(task, source).names == tuple(names)
    data, _, _ = task.load([source])
    mean = (0.25 * 1.5 + 0.75 * 0.5) if given != "balanced" else None
    expected = [9 / mean, 1.5 / mean, 0.5 / mean] if mean else [40 / 2, 40 / 10 / 2, 40 / 30 / 2]
    assert task.class_weights.tolist() == pytest.approx(expected)
    assert any(line.startswith("class weights: unseen ") for line in task.summary_lines(data, None, data.stats))
    torch.manual_seed(0)
    model, inputs = FixedLogits(torch.randn(42, 3)), whole_batch(task, data)
    labels, counts = inputs["labels"], task.count_targets(inputs)
    options = {"weight": task.class_weights, "label_smoothing": 0.1, "reduction": "sum"}
    trained = torch.nn.functional.cross_entropy(model.logits, labels, **options) / 40
    assert torch.equal(task.forward(model.train(), inputs, counts).loss, trained)
    plain = torch.nn.functional.cross_entropy(model.logits, labels)
    assert task.forward(model.eval(), inputs, counts).loss == pytest.approx(plain.item())


def test_labels_and_weights_that_do_not_fit(tmp_path, wordpiece):
    source = write_source(tmp_path, [{"text": "a", "label": name} for name in ("x", "y", "y")])
    for settings, message in (
        ({"labels": ["x", "z"]}, "labels: .* has y too; add what is missing"),
        ({"labels": ["x", "y", "x"]}, "labels: 'x' is named twice"),
        ({"class_weights": {"w": 2.0}}, "class_weights: 'w' is not one of the labels, x, y"),
        ({"class_weights": "balanced", "problem_type": "regression"}, "are for one class per text or word"),
        ({"labels": ["x", "y"], "problem_type": "regression"}, "have no names; remove labels"),
    ):
        task = Classification(wordpiece, max_len=20, **settings)
        with pytest.raises(InputError, match=message):  # noqa: PT012, either of the two
            task.find_labels(source, None, False)
            task.load([source])
    stored = SimpleNamespace(problem_type=None, num_labels=2, id2label={0: "y", 1: "x"})
    task = Classification(wordpiece, max_len=20, labels=["x", "y"])
    with pytest.raises(InputError, match="the model's head has them in the order y, x"):
        task.find_labels(source, stored, False)


def test_words_have_class_weights(tmp_path, wordpiece):
    rows = [{"tokens": ["text", "number"], "label": ["O", "B-X" if n % 4 == 0 else "O"]} for n in range(20)]
    source = write_source(tmp_path, rows)
    task = TokenClassification(wordpiece, max_len=20, class_weights="balanced")
    find_labels(task, source)
    data, _, _ = task.load([source])
    counts = {"O": 35, "B-X": 5}
    expected = [40 / counts[name] / 2 for name in task.labels.names]
    assert task.class_weights.tolist() == pytest.approx(expected)
    inputs = whole_batch(task, data)
    torch.manual_seed(0)
    model = FixedLogits(torch.randn(*inputs["labels"].shape, 2))
    loss = task.forward(model.train(), inputs, task.count_targets(inputs)).loss
    options = {"weight": task.class_weights, "reduction": "sum"}
    plain = torch.nn.functional.cross_entropy(model.logits.flatten(0, 1), inputs["labels"].flatten(), **options)
    assert torch.equal(loss, plain / 40)


# ---- texts


@pytest.mark.parametrize("pair", [None, "other"])
def test_texts_are_tokenized_as_by_the_stock_tokenizer(tmp_path, wordpiece, pair):
    source, task = write_source(tmp_path, ROWS), Classification(wordpiece, max_len=20, text_pair_column=pair)
    assert find_labels(task, source) == Labels("single_label_classification", ("0", "1", "2"))
    training, held_out = load_rows(source, task, 0.1)
    assert (len(training), len(held_out)) == (45, 5)
    ids = {tuple(held_out.read(row)[0].tolist()) for row in range(5)}
    whole = load_rows(source, task)[0]
    kept = [row for index, row in enumerate(ROWS) if tuple(whole.read(index)[0].tolist()) not in ids]
    batch = whole_batch(task, training)
    assert batch["labels"].tolist() == [row["label"] for row in kept] + [-100] * 2
    texts = [row["text"] for row in kept], *([[row["other"] for row in kept]] if pair else [])
    stock = wordpiece(*texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        width = stock[name].shape[1]
        assert torch.equal(batch[name][:45, :width], stock[name]), name
    assert batch["input_ids"].shape[1] in (8, 16, 20)  # a model from scratch has max_len positions
    assert training.stats["cut"] > 0
    assert training.lengths(np.arange(3)).tolist() == stock["attention_mask"].sum(1)[:3].tolist()


@pytest.mark.parametrize("text", ["text number {}", "text"])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_every_label_is_held_out_alike(tmp_path, wordpiece, text, fraction):
    """Also where labels alternate, in step with any regular choice, and where texts are equal."""
    rows = [{"text": text.format(n), "label": "ab"[n % 2]} for n in range(200)]
    rows += [{"text": text.format(n), "label": "rare"} for n in range(200, 210)]
    source, task = write_source(tmp_path, rows), Classification(wordpiece, max_len=20)
    names = find_labels(task, source).names
    for part, share in zip(load_rows(source, task, fraction), (1 - fraction, fraction), strict=True):
        counts = dict(zip(names, np.bincount(part.row_labels, minlength=3).tolist(), strict=True))
        for name, total in (("a", 100), ("b", 100), ("rare", 10)):
            assert abs(counts[name] - share * total) <= 1, counts
        assert len(part) == pytest.approx(share * 210, abs=1)
    assert load_rows(source, task, fraction)[1].num_examples == len(part)


def test_types_of_labels(tmp_path, wordpiece):
    def labels_of(rows, problem_type=None, **columns):
        task = Classification(wordpiece, max_len=20, problem_type=problem_type, **columns)
        return find_labels(task, write_source(tmp_path, rows))

    several = [{"text": "x", "label": ["b", "a"]}, {"text": "y", "label": []}, {"text": "z", "label": ["c"]}]
    labels = labels_of(several)
    assert labels == Labels("multi_label_classification", ("a", "b", "c"))
    assert labels.encode(["c", "a"], "row") == [1.0, 0.0, 1.0]
    assert labels.encode([], "row") == [0.0, 0.0, 0.0]
    flags = labels_of([{"text": "x", "p": 1, "q": "0"}], label_column=["p", "q"])
    assert flags.encode({"p": 1, "q": "0"}, "row") == [1.0, 0.0]
    regression = labels_of(ROWS, "regression")
    assert (regression.encode("2.5", "row"), regression.num_labels) == (2.5, 1)
    hot = labels_of([{"text": "x", "label": [0, 1, 0]}, {"text": "y", "label": [1, 1, 0]}])
    assert hot == Labels("multi_label_classification", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert hot.encode([0, 1.0, True], "row") == [0.0, 1.0, 1.0]
    assert labels_of([{"text": "x", "label": [0, 1]}, {"text": "y", "label": [3]}]).names == (
        "0",
        "1",
        "3",
    )  # their numbers
    named = Labels("multi_label_classification", ("LABEL_x", "LABEL_y"))
    assert named.encode(["LABEL_y"], "row") == [0.0, 1.0]
    with pytest.raises(InputError, match="row: the label .* is not a list of 3 numbers, 0 or 1 each"):
        hot.encode([0, 1], "row")
    with pytest.raises(InputError, match="column 'p' has 2; a class column holds 0 or 1"):
        flags.encode({"p": 2, "q": 0}, "row")
    with pytest.raises(InputError, match="names a column twice"):
        labels_of([{"text": "x", "p": 1}], label_column=["p", "p"])
    stock = Labels("single_label_classification", ("LABEL_0", "LABEL_1"))
    assert stock.encode(1, "row") == 1
    words = [{"text": "x", "label": name} for name in ("spam", "ham", "spam")]
    assert labels_of(words).names == ("ham", "spam")
    tens = [{"text": "x", "label": value} for value in (10, 9, 100)]
    assert labels_of(tens).names == ("9", "10", "100")


def test_class_names_of_a_dataset(tmp_path, wordpiece):
    import datasets

    names = datasets.ClassLabel(names=["ham", "spam"])
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": names,
            "tags": datasets.Sequence(names),
            "tokens": datasets.Sequence(datasets.Value("string")),
        }
    )
    rows = [
        {"text": "x", "label": 1, "tags": [0, 1], "tokens": ["a", "b"]},
        {"text": "y", "label": 0, "tags": [1], "tokens": ["c"]},
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = sources.file_source(str(tmp_path / "a.parquet"))
    assert find_labels(Classification(wordpiece, max_len=20), source).names == ("ham", "spam")
    assert find_labels(TokenClassification(wordpiece, max_len=20, label_column="tags"), source).names == ("ham", "spam")


# ---- words


def test_a_word_has_its_label_at_its_first_token(tmp_path, wordpiece):
    rows = [
        {"tokens": ["text", "numberpair", "\u200d", "text"], "label": ["O", "B-x", "I-x", "O"]},
        {"tokens": ["number"] * 30, "label": ["O", "B-x", "I-x"] * 10},
    ]
    source, task = write_source(tmp_path, rows), TokenClassification(wordpiece, max_len=16)
    names = find_labels(task, source).names
    assert names == ("B-x", "I-x", "O")
    examples, _ = load_rows(source, task)
    assert examples.num_examples == 2
    assert len(examples) > 2  # the second goes into several rows
    assert examples.stats["cut"] == 1
    batch = whole_batch(task, examples)
    # each word has one target, also without tokens of its own and at the end of a row
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()
    assert [names[label] for label in labels] == rows[0]["label"] + rows[1]["label"]
    stock = wordpiece(["text", "numberpair", "[UNK]", "text"], is_split_into_words=True)
    first = batch["input_ids"][0][: len(stock["input_ids"])].tolist()
    assert first == stock["input_ids"]
    word_ids = stock.word_ids()
    starts = [token for token, word in enumerate(word_ids) if word is not None and word != word_ids[token - 1]]
    assert torch.nonzero(batch["labels"][0] != IGNORE_INDEX)[:, 0].tolist() == starts
    assert examples.rows_of_examples([1]).tolist() == list(range(1, len(examples)))
    whole = wordpiece(["number"] * 30, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    inside = [n for row in range(1, len(examples)) for n in examples.read(row)[0][1:-1].tolist()]
    assert inside == whole


def test_conll_files(tmp_path, wordpiece):
    (tmp_path / "a.conll").write_text(
        "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\n"
        "# text = a comment\n#tag NN I-NP O\n\ufeff\nLast NN O B-ORG"
    )
    source = sources.file_source(str(tmp_path / "a.conll"))
    task = TokenClassification(wordpiece, max_len=20)
    records = list(task.read(source))
    assert [row["tokens"] for _, row in records] == [["EU", "rejects"], ["#tag"], ["Last"]]
    assert [row["label"] for _, row in records] == [["B-ORG", "O"], ["O"], ["B-ORG"]]
    assert records[0][0].endswith("a.conll line 3")
    # with tabs, a word may contain spaces; unusual words are kept as they are
    (tmp_path / "b.txt").write_text("New York\tB-LOC\nis\tO\n\u00a0\tO\n")
    assert next(task.read(sources.file_source(str(tmp_path / "b.txt"))))[1]["tokens"] == ["New York", "is", "\u00a0"]
    (tmp_path / "c.txt").write_text("# sent_id = 1\n# O\nNew\u00a0York B-LOC\n# O\n")
    assert next(task.read(sources.file_source(str(tmp_path / "c.txt"))))[1]["tokens"] == ["#", "New\u00a0York", "#"]


def test_the_scheme_of_entities_is_known_by_the_labels(tmp_path, wordpiece):
    for labels, scheme in (
        (["O", "B-X", "I-X"], "IOB"),
        (["O", "I-X"], "IOB"),
        (["O", "B-X", "I-X", "E-X", "S-Y"], "BIOES"),
        (["O", "B-X", "I-X", "L-X", "U-Y"], "BILOU"),
        (["O", "B-X", "L-X"], "BILOU"),
        (["B", "M", "E", "S"], "BMES"),
        (["B", "I", "O"], "IOB"),
        (["O", "B-X", "E-X", "U-X"], "mixed"),
        (["O", "B-X", "I-X", "MISC"], "mixed"),
        (["NOUN", "VERB", "O"], None),
        (["B-side", "A-side"], None),
        (["U-turn", "S-curve", "O"], None),
        (["B", "M"], None),
        (["I", "E", "S", "X"], None),
        (["O", "B-X", "I-X", "X", "_", "[PAD]"], "IOB"),
        (["o", "B-X", "I-X"], "IOB"),
        (["O", "A-side", "B-side"], None),
        (["O", "S-curve", "B-road", "U-turn"], None),
    ):
        assert find_scheme(labels) == scheme, labels
        rows = [{"tokens": ["text"] * len(labels), "label": labels}]
        task = TokenClassification(wordpiece, max_len=20)
        if scheme == "mixed":
            with pytest.raises(InputError, match=r"a.jsonl: the labels mix schemes of entities: B-X, .*; use IOB"):
                find_labels(task, write_source(tmp_path, rows))
        else:
            find_labels(task, write_source(tmp_path, rows))
            assert task.has_entities == (scheme is not None)
    with pytest.raises(InputError, match="label_column: the labels of words are one column"):
        TokenClassification(wordpiece, max_len=20, label_column=["a", "b"])


def test_other_spellings_of_entities_are_said_to_be_scored_word_by_word(tmp_path, wordpiece):
    for labels, is_said in (
        (["o", "b-per", "i-per"], True),
        (["O", "PER-B", "PER-I", "LOC-B"], True),
        (["O", "B_PER", "I_PER"], True),
        (["outside", "B-PER", "I-PER"], True),
        (["O", "B-PER", "I-PER"], False),
        (["NOUN", "VERB", "X"], False),
        (["sub-b", "noun"], False),
    ):
        task = TokenClassification(wordpiece, max_len=20)
        source = write_source(tmp_path, [{"tokens": ["text"] * len(labels), "label": labels}])
        find_labels(task, source)
        assert task.has_entities == (labels[1] == "B-PER" and not is_said)
        rows, _, stats = task.load([source], source)
        assert any("scored word by word" in line for line in task.summary_lines(rows, None, stats["train"])) == is_said


# ---- questions


CONTEXT = "text number pair " * 12 + "text number text"


def squad(path, questions, context=CONTEXT):
    qas = [{"id": str(n), "question": "number pair?", **question} for n, question in enumerate(questions)]
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}))
    return sources.file_source(str(path))


@pytest.mark.parametrize("stride", [None, 7])
def test_windows_are_those_of_the_stock_tokenizer(tmp_path, wordpiece, stride):
    at = CONTEXT.rindex("number")
    answers = [{"answers": [{"text": "number", "answer_start": at}]}, {"is_impossible": True, "answers": []}]
    source = squad(tmp_path / "a.json", answers)
    task = QuestionAnswering(wordpiece, max_len=24, stride=stride)
    examples, _ = load_rows(source, task)
    room = 24 - len(wordpiece("number pair?")["input_ids"]) - 1
    stock = wordpiece(
        "number pair?",
        CONTEXT,
        truncation="only_second",
        max_length=24,
        stride=room - (stride or room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert examples.num_examples == 2
    assert len(examples) == 2 * len(stock["input_ids"])
    holds = 0
    for row, (ids, spans, types) in enumerate(
        zip(stock["input_ids"], stock["offset_mapping"], stock["token_type_ids"], strict=True)
    ):
        read, second = examples.read(row)
        assert read.tolist() == ids
        assert second == types.index(1)
        assert examples.token_offsets(row)[second : len(ids) - 1].tolist() == [
            list(pair) for pair in spans[second : len(ids) - 1]
        ]
        first, last = examples.row_labels[row].tolist()
        if spans[second][0] <= at and spans[len(ids) - 2][1] >= at + 6:
            holds += 1
            assert (spans[first][0], spans[last][1]) == (at, at + 6)
        else:
            assert (first, last) == (0, 0)
    assert holds >= 1
    assert (examples.row_labels[len(examples) // 2 :] == 0).all()
    assert examples.stats["unanswerable"] == 1


def test_answers_combine_all_windows_of_a_context(tmp_path, wordpiece):
    at = CONTEXT.rindex("number")
    source = squad(tmp_path / "a.json", [{"answers": [{"text": "number text", "answer_start": at}]}] * 2)
    task = QuestionAnswering(wordpiece, max_len=24)
    examples, _ = load_rows(source, task)
    task.configure(SimpleNamespace(pad_token_id=0, type_vocab_size=2), 24)
    indices = np.arange(len(examples))
    batch = task.batch(examples, indices)
    shape = batch["input_ids"].shape
    outputs = type("", (), {"start_logits": torch.zeros(shape), "end_logits": torch.zeros(shape)})
    for row in indices:  # certain of the answer in rows that hold it, and of no answer elsewhere
        first, last = examples.row_labels[row]
        outputs.start_logits[row, first], outputs.end_logits[row, last] = 9, 9
    predictions = task.predictions(outputs, examples, indices)
    for may_refuse in (False, True):
        answers = task.answers(examples, indices, predictions, may_refuse)
        assert [own[0][1:] for own in answers.values()] == [("number text", at)] * 2
        assert [own[0][0] for own in answers.values()] == [18.0] * 2
    predictions, references = task.metric_inputs(examples, indices, predictions)
    assert task.compute_metrics(predictions, references) == {"exact_match": 1, "f1": 1}
    assert predictions[1] == {"id": "1", "prediction_text": "number text"}
    assert references[1] == {"id": "1", "answers": {"text": ["number text"], "answer_start": [at]}}
    outputs.start_logits[:, 0] = outputs.end_logits[:, 0] = 99  # no row holds the answer
    predictions = task.predictions(outputs, examples, indices)
    assert task.answers(examples, indices, predictions, True)[0][0][1] == ""
    assert task.answers(examples, indices, predictions, False)[0][0][1] == "number text"


def test_a_context_is_not_split_between_training_and_validation(tmp_path, wordpiece):
    rows = [
        {
            "id": f"{n}-{k}",
            "question": "text?",
            "context": f"text number {n}",
            "answers": {"text": ["text"], "answer_start": [0]},
        }
        for k in range(3)
        for n in range(10)
    ]
    training, held_out = load_rows(write_source(tmp_path, rows), QuestionAnswering(wordpiece, max_len=24), 0.2)
    sides = [{part.records[item]["context"] for item in range(part.num_examples)} for part in (training, held_out)]
    assert [len(side) for side in sides] == [8, 2]
    assert not sides[0] & sides[1]
    assert held_out.num_examples == 6


# ---- conversations


def targets(task, examples):
    """Return the text of each row, and the text of its targets."""
    decode = task.tokenizer.decode
    return [
        (decode(examples.read(row)[0]), decode(examples.read(row)[0][examples.token_labels(row) == 1]))
        for row in range(len(examples))
    ]


def test_only_completions_and_the_assistants_turns_are_targets(tmp_path, bpe):
    rows = [
        {"prompt": "hello", "completion": " there"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well met"}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
                {"role": "user", "content": "never answered"},
            ]
        },
        {
            "prompt": [
                {"role": "user", "content": "e"},
                {"role": "assistant", "content": "shown"},
                {"role": "user", "content": "f"},
            ],
            "completion": [{"role": "assistant", "content": "g"}],
        },
    ]
    bpe.chat_template = CHAT
    task = Instruction(bpe, max_len=64)
    examples, _ = load_rows(write_source(tmp_path, rows), task)
    end = bpe.eos_token
    assert targets(task, examples) == [
        (f"hello there{end}", f" there{end}"),
        (f"<user>hello\n<assistant>well met\n{end}", f"well met\n{end}"),
        (f"<user>a\n<assistant>b\n<user>c\n<assistant>d\n{end}", f"b\nd\n{end}"),
        (f"<user>e\n<assistant>shown\n<user>f\n<assistant>g\n{end}", f"g\n{end}"),
    ]


def chat(*turns, **columns):
    """Return a row of turns given as "u:text" of the user or "a:text" of the assistant, or as dicts."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": roles[t[0]], "content": t[2:]} if isinstance(t, str) else t for t in turns]
    return {"messages": messages} | columns


def learned_texts(tmp_path, tokenizer, rows, name="a.jsonl", **settings):
    task = Instruction(tokenizer, max_len=2000, **settings)
    return targets(task, load_rows(write_source(tmp_path, rows, name), task)[0])


def test_a_chat_that_begins_with_the_assistant(tmp_path, bpe):
    """Neither the system turn that the template adds nor the header of the first turn is learned."""
    turn = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}<end>\n{% endfor %}"
    system = "{% if messages[0]['role'] != 'system' %}<system>You are welcome.<end>\n{% endif %}"
    bpe.add_special_tokens({"additional_special_tokens": ["<end>"]})
    for template in (system + turn, "{% if messages %}" + system + "{% endif %}" + turn):
        bpe.chat_template = template + "{% if add_generation_prompt %}<assistant>{% endif %}"
        rows = [chat("a: welcome ", "u:hi", "a:bye"), chat("s:x", "a:welcome", "u:hi", "a:bye"), chat("a:assistant")]
        learned = [text for _, text in learned_texts(tmp_path, bpe, rows)]
        assert learned == ["welcome<end>\nbye<end>\n"] * 2 + ["assistant<end>\n"]


def test_turns_of_weight_0_are_read_and_not_learned(tmp_path, bpe):
    bpe.chat_template, end = CHAT, bpe.eos_token
    wrong = {"role": "assistant", "content": "wrong"}
    for mark in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}):
        rows = [chat("u:a", wrong | mark, "u:b", {"role": "assistant", "content": "right", "weight": 1})]
        rows += [chat("u:a", "a:right", "u:b", wrong | mark)]
        both = learned_texts(tmp_path, bpe, rows)
        assert both[0] == (f"<user>a\n<assistant>wrong\n<user>b\n<assistant>right\n{end}", f"right\n{end}")
        assert both[1] == (f"<user>a\n<assistant>right\n{end}", f"right\n{end}")
    for row, message in (
        (chat("u:a", wrong | {"weight": 0.5}), "turn 2: its weight or train or training must be 0 or 1: .0.5"),
        (chat("u:a", wrong | {"weight": "0"}), "turn 2: its weight"),
        (chat("u:a", wrong | {"weight": 0}), "has no assistant's turn to learn"),
    ):
        with pytest.raises(InputError, match=f"line 1.*{message}"):
            learned_texts(tmp_path, bpe, [row])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_tools_and_tool_calls_reach_the_template(tmp_path, bpe, name):
    def learned(row):
        if name.endswith("parquet"):  # every turn gets all keys, and an absent one is None
            import datasets

            datasets.Dataset.from_list([row, chat("u:q", "a:r")]).to_parquet(tmp_path / name)
            task = Instruction(bpe, max_len=2000)
            return targets(task, load_rows(sources.file_source(str(tmp_path / name)), task)[0])[0]
        return learned_texts(tmp_path, bpe, [row])[0]

    tools, call = [{"name": "clock"}], {"role": "assistant", "tool_calls": [{"name": "clock"}]}
    bpe.chat_template, end = CHAT, bpe.eos_token
    for row, message in (
        (chat("u:a", "a:b", tools=tools), "has tools, which the chat template leaves out"),
        (chat("u:a", call, "u:c", "a:d"), "has tool_calls, which the chat template leaves out"),
    ):
        with pytest.raises(InputError, match=f"(line|row) 1 {message}; give another --chat_template"):
            learned(row)
    in_turn = (
        "{% if 'tool_calls' in m %}CALL {{ m.tool_calls | map(attribute='name') | join }}{% endif %}{{ m['content'] }}"
    )
    bpe.chat_template = "{% if tools %}TOOLS {{ tools[0].name }}\n{% endif %}" + CHAT.replace(
        "{{ m['content'] }}", in_turn
    )
    assert learned(chat("u:a", "a:b", tools=tools)) == (f"TOOLS clock\n<user>a\n<assistant>b\n{end}", f"b\n{end}")
    assert learned(chat("u:a", "a:b", tools=json.dumps(tools)))[0].startswith("TOOLS clock\n<user>a")
    assert learned(chat("u:a", call, "u:c", "a:d")) == (
        f"<user>a\n<assistant>CALL clock\n<user>c\n<assistant>d\n{end}",
        f"CALL clock\nd\n{end}",
    )
    prompt = {"prompt": chat("u:a")["messages"], "completion": chat("a:b")["messages"], "tools": tools}
    if name == "a.jsonl":
        assert learned(prompt)[0].startswith("TOOLS clock\n<user>a")
        with pytest.raises(InputError, match="tools is text that is not JSON: '{'"):
            learned(chat("u:a", "a:b", tools="{"))
    assert learned(chat("u:a", "a:b", tools=""))[1] == f"b\n{end}"
    bpe.chat_template = CHAT.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | default('') | tojson }}"
    )
    calls = [{"role": "assistant", "tool_calls": [{"arguments": {key: 1}}]} for key in "xy"]
    assert '[{"arguments": {"x": 1}}]' in learned(chat("u:a", calls[0], "u:c", calls[1]))[0]  # and no "y": null


def test_a_template_that_does_not_end_is_interrupted(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer, "TEMPLATE_SECONDS", 0.2)
    bpe.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"the chat template does not end within 0.2 seconds"):
        learned_texts(tmp_path, bpe, [chat("u:a", "a:b")], skip_bad_rows=True)
    with pytest.raises(InputError, match=r"the chat template does not end within 0.2 seconds"):
        encode_prompt(bpe, "hi", 100, is_chat=True)
    bpe.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match="--chat: the chat template refuses it: no"):
        encode_prompt(bpe, "hi", 100, is_chat=True)


def test_a_turn_that_closes_itself_gets_no_other_end(tmp_path, bpe):
    bpe.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    bpe.chat_template = CHAT.replace("\\n", "\n").replace("{{ m['content'] }}\n", "{{ m['content'] }}<|im_end|>\n")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    task = Instruction(bpe, max_len=64)
    examples, _ = load_rows(write_source(tmp_path, rows), task)
    assert targets(task, examples)[0][1] == "b<|im_end|>\n"


def test_templates_that_render_a_turn_differently_later(tmp_path, bpe):
    """A template that ends the whole chat with the end of text, and one that drops old thoughts."""
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "t:b"), ("user", "c"), ("assistant", "t:d"))
    ]
    source = write_source(tmp_path, [{"messages": turns}, {"messages": turns[:3]}])
    bpe.chat_template = CHAT.replace("<assistant>{% endif %}", "<assistant>{% else %}{{ eos_token }}{% endif %}")
    end, task = bpe.eos_token, Instruction(bpe, max_len=64)
    rows = targets(task, load_rows(source, task)[0])
    assert [text for _, text in rows] == [f"t:b\nt:d\n{end}", f"t:b\n{end}"]
    bpe.chat_template = CHAT.replace("m['content']", "(m['content'] if loop.last else m['content'].split(':')[-1])")
    task = Instruction(bpe, max_len=64)
    examples, _ = load_rows(write_source(tmp_path, [{"messages": turns}]), task)
    assert [text for _, text in targets(task, examples)] == [f"t:d\n{end}"]
    assert examples.stats["unlearned"] == 1


def test_only_a_closing_token_closes_a_turn(tmp_path, wordpiece):
    """An unknown or an opening token at the end does not close a turn."""
    for text in ("text \u2603", "text [CLS]", "text [UNK] "):
        task = Instruction(wordpiece, max_len=64)
        examples, _ = load_rows(write_source(tmp_path, [{"prompt": "number", "completion": text}]), task)
        assert examples.read(0)[0][-1] == wordpiece.sep_token_id
        assert examples.token_labels(0)[-1] == 1


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_conversations_in_a_row_do_not_see_each_other(tmp_path, bpe, packing):
    rows = [{"prompt": "hello" * (n % 5 + 1), "completion": " there" * (n % 3 + 1)} for n in range(30)]
    task = Instruction(bpe, max_len=40, packing=packing)
    examples, _ = load_rows(write_source(tmp_path, rows), task)
    packed = task.make_rows(examples, "x")
    assert (len(packed) < len(examples)) == (packing == "best_fit")
    batch = task.batch(packed, np.arange(len(packed)))
    targets = batch["shift_labels"][batch["shift_labels"] != IGNORE_INDEX]
    # every target of the examples is a target of one row
    assert sorted(targets.tolist()) == sorted(examples.tokens.read(0, 10**6)[examples.all_labels == 1].tolist())
    if packing == "best_fit":
        assert int((batch["position_ids"] == 0).sum()) >= len(examples)
    # and the model has read exactly the text before it
    first = batch["shift_labels"][0] != IGNORE_INDEX
    token = int(torch.nonzero(first)[0])
    assert bpe.decode(batch["input_ids"][0][: token + 1]).startswith("hello")


def test_a_prompt_is_tokenized_as_by_the_stock_tokenizer(tmp_path, assets):
    llama = AutoTokenizer.from_pretrained(assets / "weights" / "stories260K")
    task = Instruction(llama, max_len=64)
    examples, _ = load_rows(write_source(tmp_path, [{"prompt": "Once upon", "completion": " a time"}]), task)
    ids, is_target = examples.read(0)[0].tolist(), examples.token_labels(0).tolist()
    prompt = llama("Once upon")["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert is_target == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[-1] == llama.eos_token_id


# ---- mistakes


def test_too_few_examples_to_hold_some_out(tmp_path, wordpiece):
    task = Classification(wordpiece, max_len=20)
    source = write_source(tmp_path, ROWS[:7])
    find_labels(task, source)
    with pytest.raises(
        InputError, match=r"too few rows to hold out 0.05 of them: give --val_file FILE, or --val_fraction 0"
    ):
        load_rows(source, task, 0.05)


def test_skipped_examples_add_no_class(tmp_path, wordpiece):
    rows = [{"text": "x", "label": None}, {"text": "x", "label": ["a"]}, {"text": "y", "label": ["b"]}]
    labels = find_labels(Classification(wordpiece, max_len=20, skip_bad_rows=True), write_source(tmp_path, rows))
    assert labels == Labels("multi_label_classification", ("a", "b"))
    rows = [*ROWS[:6], {"text": None, "label": 77}]
    assert find_labels(
        Classification(wordpiece, max_len=20, skip_bad_rows=True), write_source(tmp_path, rows)
    ).names == (
        "0",
        "1",
        "2",
    )


def test_a_tokenizer_is_trained_on_texts_without_labels(tmp_path):
    def texts(name, rows, file="a.jsonl"):
        return list(LabelledTexts([write_source(tmp_path, rows, file)], name))

    assert texts("token_classification", [{"tokens": ["a", "b"], "label": ["X", "Y"]}, {"tokens": []}]) == ["a b"]
    asked = {"question": "q?", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}}
    assert texts("question_answering", [asked]) == ["q?", "c"]
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    assert texts("instruction", [chat, {"prompt": "a", "completion": "b"}]) == ["hi", "ho", "a", "b"]


def test_mistakes_are_named_by_their_place(tmp_path, wordpiece, bpe):
    def check(message, rows, task_class=Classification, problem_type=None, known=None, num_kept=None, **columns):
        source = write_source(tmp_path, rows)
        settings = {"max_len": 20, "problem_type": problem_type} | columns
        task = task_class(bpe if task_class is Instruction else wordpiece, **settings)

        def load(skip=False):
            task.settings.skip_bad_rows = skip
            task.labels = known or find_labels(task, source)
            return load_rows(source, task)[0]

        with pytest.raises(InputError, match=message):
            load()
        if num_kept is not None:
            examples = load(skip=True)
            assert (examples.num_examples, examples.stats["skipped"]) == (num_kept, len(rows) - num_kept)
            assert examples.stats["skip_reasons"]

    good = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
    known = Labels("single_label_classification", ("a", "b"))
    check("line 3 has no label", [*good, {"text": "z", "label": None}], num_kept=2)
    check("line 3 has no label", [*good, {"text": "z", "label": ""}], known=known)
    check("line 3 has no column 'label'", [*good, {"text": "z"}], num_kept=2)
    check(
        "line 3: the label 3 is of another type than that of .* line 1",
        [*good, {"text": "z", "label": 3}],
        num_kept=2,
    )
    check(
        "line 3: the label 'c' is not in the training data",
        [*good, {"text": "z", "label": "c"}],
        known=known,
        num_kept=2,
    )
    check("line 1: the label 0.5 is not the name or number", [{"text": "z", "label": 0.5}])
    check("line 1: the label 'a' is not a number", good, problem_type="regression")
    check("has 1 label: there is nothing to tell apart", good[:1])
    check("line 1 has no column 'class', but 'text', 'label'; name it with --label_column", good, label_column="class")
    check("line 1 has no column 'more'", good, text_pair_column="more")
    check("line 3: column 'text' does not hold text: 3", [*good, {"text": 3, "label": "a"}], num_kept=2)
    check("line 3: half a character", [*good, {"text": "z", "label": "\ud800"}], num_kept=2)
    check(
        "line 3: the label 1000",
        [{"text": "x", "label": 1}] * 2 + [{"text": "x", "label": 10**400}],
        problem_type="regression",
    )
    check("line 3: half a character", [*good, {"text": "\ud800", "label": "a"}], num_kept=2)

    words = [{"tokens": ["x", "y"], "label": ["O", "B-z"]}]
    check(
        "line 2 has 2 words and 1 labels",
        [*words, {"tokens": ["x", "y"], "label": ["O"]}],
        TokenClassification,
        num_kept=1,
    )
    check(
        r"line 2, word 2 \('y'\) has no label",
        [*words, {"tokens": ["x", "y"], "label": ["O", None]}],
        TokenClassification,
        num_kept=1,
    )
    check("line 2 has no words", [*words, {"tokens": [], "label": []}], TokenClassification, num_kept=1)
    check(
        "line 2: column 'tokens' does not hold a list",
        [*words, {"tokens": "x y", "label": ["O"]}],
        TokenClassification,
        num_kept=1,
    )

    def question(text, start, **more):
        return {
            "question": "text?",
            "context": "text number",
            "answers": {"text": [text], "answer_start": [start]},
        } | more

    right = question("text", 0)
    check(
        "the answer 'number' does not stand at 9, where the text has",
        [right, question("number", 9)],
        QuestionAnswering,
        num_kept=1,
    )
    check(
        "the answer 'number' does not stand at 2, where the text has 'xt num'",
        [right, question("number", 2)],
        QuestionAnswering,
        num_kept=1,
    )
    check("line 2 has no answers", [right, question("", 0, answers=None)], QuestionAnswering, num_kept=1)
    odd = [["x"], {"text": "text", "answer_start": 0}, {"text": None, "answer_start": None}]
    for answers in odd:
        check(
            "line 2 has no answers, lists of text and answer_start",
            [right, question("", 0, answers=answers)],
            QuestionAnswering,
            num_kept=1,
        )
    check(
        "line 2: is_impossible is 'false'",
        [right, question("text", 0, is_impossible="false")],
        QuestionAnswering,
        num_kept=1,
    )
    check("line 2 has an empty question", [right, question("text", 0, question=" ")], QuestionAnswering, num_kept=1)
    check(
        "question has 30 tokens, and max_len 20 leaves none",
        [right, question("text", 0, question="text " * 30)],
        QuestionAnswering,
        num_kept=1,
    )
    broken = [{"data": [{"paragraphs": [{"qas": []}, {"no": 1}]}]}]
    check("article 1 paragraph 2 is not in SQuAD's format", broken, QuestionAnswering)

    good = {"prompt": "hello", "completion": " there"}
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    check(
        "has no chat template: give --chat_template",
        [{"messages": [*chat["messages"], {"role": "assistant", "content": "x"}]}],
        Instruction,
    )
    bpe.chat_template = CHAT
    check("line 2 has no assistant's turn", [good, chat], Instruction, num_kept=1)
    check("line 2, turn 1 has no content", [good, {"messages": [{"role": "user"}]}], Instruction, num_kept=1)
    check("line 2: messages is not a list", [good, {"messages": "hi"}], Instruction, num_kept=1)
    check("line 2 has no completion", [good, {"prompt": "x", "completion": ""}], Instruction, num_kept=1)
    check(
        "line 2 has .* tokens, and max_len is 20",
        [good, {"prompt": "x" * 99, "completion": "y"}],
        Instruction,
        num_kept=1,
    )
    check("line 2 has neither messages, conversations", [good, {"prompt": "x"}], Instruction, num_kept=1)
    turn = [{"role": "user", "content": "x"}]
    check(
        "completion is not a list of turns, each with role and content: 5",
        [good, {"prompt": turn, "completion": 5}],
        Instruction,
        num_kept=1,
    )
    bpe.chat_template = "{{ 1 / 0 }}"
    chat = {"messages": [{"role": "assistant", "content": "x"}]}
    check("the chat template refuses it: division", [good, chat], Instruction, num_kept=1)
    bpe.chat_template = "{{ raise_exception('roles must alternate') }}"
    check(
        "the chat template refuses it: roles must alternate",
        [good, {"messages": [{"role": "assistant", "content": "x"}]}],
        Instruction,
        num_kept=1,
    )

    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="a.txt has no columns"):
        find_labels(Classification(wordpiece, max_len=20), sources.file_source(str(tmp_path / "a.txt")))


def test_a_class_that_only_one_part_has_is_named(tmp_path, wordpiece):
    rows = [{"text": f"text {n}", "label": "abc"[n % 3]} for n in range(12)]
    source = write_source(tmp_path, rows)
    val = write_source(tmp_path, [row for row in rows if row["label"] != "c"], "val.jsonl")
    task = Classification(wordpiece, max_len=20, labels=["c", "b", "a", "unseen"])
    find_labels(task, source)
    train_rows, val_rows, stats = task.load([source], val)
    lines = task.summary_lines(train_rows, val_rows, stats["train"])
    assert "no training row has the label unseen" in lines
    assert any(line.startswith("no validation row has the label c, unseen; f1_macro leaves out") for line in lines)
    metrics = task.compute_metrics([2, 1, 1, 1], [2, 2, 1, 1])  # c is neither predicted nor expected
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    extra = write_source(tmp_path, [*rows, {"text": "text", "label": "d"}], "extra.jsonl")
    with pytest.raises(
        InputError, match="extra.jsonl line 13: the label 'd' is not in the training data.*; name it in"
    ):
        task.load([source], extra)
