"""Token classification: the label of each word of a sentence, such as named entities."""

import re
from itertools import chain

import datasets
import numpy as np

from ..data.columns import BadRowError, check_text, read_column
from ..data.conll import read_conll
from ..data.discovery import file_suffix
from ..data.tokenizer import end_of_document
from ..errors import InputError
from .base import IGNORE_INDEX, cross_entropy, join_segments, join_tokens
from .classification import classification_metrics, read_lines
from .labelled import LabelNames, PredictionTask


class TokenClassification(LabelNames, PredictionTask):
    """Predict the class of each word, from the first token of the word: the labels of a batch are (rows, tokens).

    A sentence that is longer than a row becomes several rows, cut between words, so that each word has one target.
    """

    label_feature = datasets.List(datasets.Value("int64"))
    default_text_column = "tokens"

    def __init__(self, tokenizer=None, seed=0, **settings):
        super().__init__(tokenizer, seed, **settings)
        if isinstance(self.label_column, list):
            raise InputError("label_column: the labels of words are one column; name one")

    # ---- examples and rows

    def read(self, source):
        if source.format != "text":
            return super().read(source)
        if not self.reads_labels and all(file_suffix(file) == ".txt" for file in source.files):
            return read_lines(source, self.text_column)
        return read_conll(source, self.text_column, self.label_column, self.reads_labels)

    def texts(self, record, where):
        return [" ".join(self._words(record, where))]

    def parse(self, record, where):
        words = self._words(record, where)
        labels = [0] * len(words)
        if self.reads_labels:
            labels = [self.labels.label_id(label, place) for label, place in self.label_values(record, where)]
        columns = {self.text_column: words}
        return {"words": words, "labels": labels, "key": repr((words, labels)), "record": columns}

    def _words(self, record, where):
        words = read_column(record, where, self.text_column, "text_column")
        if isinstance(words, str) and not self.reads_labels:
            words = words.split()
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise BadRowError(f"{where}: column {self.text_column!r} does not hold a list of words: {words!r:.80}")
        if not words:
            raise BadRowError(f"{where} has no words")
        return [check_text(word, where) for word in words]

    def label_values(self, record, where):
        words, labels = self._words(record, where), self.read_labels(record, where)
        if not isinstance(labels, list) or len(labels) != len(words):
            count = f"{len(labels)} labels" if isinstance(labels, list) else "no list of labels"
            raise BadRowError(f"{where} has {len(words)} words and {count}; give each word a label")
        places = (f"{where}, word {index} ({word!r:.40})" for index, word in enumerate(words, start=1))
        return list(zip(labels, places, strict=True))

    def tokenize(self, examples):
        return self.backend().encode_batch([example["words"] for example in examples], is_pretokenized=True)

    def example_rows(self, example, encoding):
        words, labels = example["words"], example["labels"]
        missing = set(range(len(words))) - set(encoding.word_ids)
        if not missing and len(encoding.ids) <= self.max_len:
            return [_row(encoding, labels)], False
        # a word without tokens becomes the unknown token, so that it has a prediction
        unknown = self.tokenizer.unk_token or self.tokenizer.decode(end_of_document(self.tokenizer)[:1])
        words = [unknown if index in missing else word for index, word in enumerate(words)]
        word_ids = [index for index in encoding.word_ids if index is not None]
        lengths = np.bincount(word_ids, minlength=len(words)).clip(min=1)
        backend = self.backend(self.max_len)
        room = self.max_len - backend.num_special_tokens_to_add(False)
        starts, used = [0], 0
        for index, length in enumerate(lengths):
            if used and used + length > room:
                starts, used = [*starts, index], 0
            used += length
        pieces = list(zip(starts, [*starts[1:], len(words)], strict=True))
        rows = [_row(backend.encode(words[a:b], is_pretokenized=True), labels[a:b]) for a, b in pieces]
        self.backend()
        return rows, len(pieces) > 1

    def batch_labels(self, rows, indices, width):
        labels = [[rows.token_labels(index)] for index in indices]
        return join_segments(labels, width, IGNORE_INDEX)[0]

    # ---- loss, predictions, metrics

    def loss_sum(self, outputs, labels, mask):
        return cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten())

    def predictions(self, outputs, rows, indices):
        """Return the probability of each class for each word, (words, classes), of each row."""
        scores = outputs.logits.float().softmax(-1).cpu().numpy()
        positions = [np.flatnonzero(rows.token_labels(index) != IGNORE_INDEX) for index in indices]
        return [scores[row, own] for row, own in enumerate(positions)]

    has_one_class = True

    def labels_of(self, source):
        labels = super().labels_of(source)
        if find_scheme(labels.names) == "mixed":
            shown = ", ".join(labels.names[:12])
            raise InputError(f"{source.name}: the labels mix schemes of entities: {shown}; use IOB, BIOES or BILOU")
        return labels

    def summary_lines(self, train_rows, val_rows, stats):
        lines = super().summary_lines(train_rows, val_rows, stats)
        if looks_like_entities(self.labels.names):
            lines.append("labels are scored word by word; for scores of whole entities, write them as B-X, I-X and O")
        return lines

    @property
    def has_entities(self):
        """Whether labels mark entities of several words."""
        return find_scheme(self.labels.names) is not None

    def metric_inputs(self, rows, indices, predictions):
        """Return label names, sentence by sentence, of entities; otherwise the label ids of all words."""
        labels = [own[own != IGNORE_INDEX] for own in map(rows.token_labels, indices)]
        predicted = [scores.argmax(-1) for scores in predictions]
        sentences = [
            [np.concatenate(parts).tolist() for parts in rows.group_by_example(indices, values).values()]
            for values in (predicted, labels)
        ]
        if not self.has_entities:
            return tuple(list(chain(*ids)) for ids in sentences)
        return tuple([[self.labels.names[label] for label in ids] for ids in group] for group in sentences)

    def compute_metrics(self, predictions, references):
        if self.has_entities:
            return entity_metrics(predictions, references)
        return classification_metrics(predictions, references, self.labels)

    def describe_predictions(self, rows, predictions):
        """Yield the words of each example with their labels and scores, and the entities that they form."""
        names = self.labels.names
        for example, parts in rows.group_by_example(np.arange(len(rows)), predictions).items():
            scores = np.concatenate(parts)
            labels = [names[label] for label in scores.argmax(-1)]
            (words,) = rows.records[example].values()
            entities = [
                {"type": entity_type, "text": " ".join(words[first : last + 1]), "first": first, "last": last}
                for entity_type, first, last in (find_entities(labels) if self.has_entities else ())
            ]
            scores = scores.max(-1).tolist()
            yield rows.records[example] | {"labels": labels, "scores": scores, "entities": entities}

    def describe_target(self, batch, index):
        labels = batch["labels"][index].tolist()
        return join_tokens(
            ["·" if label == IGNORE_INDEX else self.labels.names[label] for label in labels], len(labels)
        )


def _row(encoding, labels):
    """Return a row with the label of each word at its first token."""
    token_labels, before = [], None
    for word in encoding.word_ids:
        token_labels.append(IGNORE_INDEX if word is None or word == before else labels[word])
        before = word
    return {"input_ids": encoding.ids, "second_text": len(encoding.ids), "labels": token_labels}


_SCHEMES = {"IOB": set("BI"), "BIOES": set("BIES"), "BILOU": set("BILU"), "BMES": set("BMES")}
_MARKS = set("BIESLUM")
_NO_ENTITY = re.compile(r".|[\W_]+|[\[<].*[\]>]")  # beside a scheme: O, X, _, [PAD]
_OUTSIDE = ("outside", "out", "other", "none", "null")
_SPELLING = re.compile(r"[bieslum][\W_]\S+|\S+[\W_][bieslum]", re.IGNORECASE)  # b-per, B_PER, PER-B


def find_scheme(names):
    """Return the scheme in which labels mark entities of several words, None if they do not, or "mixed".

    A label of a scheme is O, or a letter of the scheme, alone or with a hyphen and the type of the entity.
    """
    marks = {name[0] for name in names if _mark_of(name) in _MARKS}
    others = {name for name in names if _mark_of(name) not in _MARKS} - {"O"}
    if not any("-" in name for name in names):  # without types, only where no other label stands beside them
        is_complete = not others and ({"B", "I"} <= marks or {"B", "M", "E"} <= marks)
    else:
        others = {name for name in others if not _NO_ENTITY.fullmatch(name)}
        is_complete = bool(marks & {"B", "I"}) and not (others and "O" not in names)
    scheme = next((name for name, letters in _SCHEMES.items() if marks <= letters and not others), None)
    if not is_complete or scheme:
        return scheme if is_complete else None
    types = [name[2:] for name in names if _mark_of(name) in _MARKS]
    is_plain = any(_mark_of(name) for name in others) or len(types) == len(set(types))  # A-side, S-curve
    return None if is_plain else "mixed"


def looks_like_entities(names):
    """Return whether labels mark entities in a spelling that [`find_scheme`] does not know."""
    inside = [name for name in names if name.lower() not in _OUTSIDE and not _NO_ENTITY.fullmatch(name)]
    return bool(inside) and find_scheme(names) is None and all(map(_SPELLING.fullmatch, inside))


def _mark_of(label):
    return label[:1] if label[1:2] in ("", "-") else None


def find_entities(labels):
    """Return (type, first word, last word) of the entities in the labels of a sentence, of any of the schemes.

    As in CoNLL's script, an entity also begins where the type changes, and after the end of another; so IOB labels may
    mark each beginning with B (IOB2), or only that of an entity right after another of its type (IOB1).
    """
    entities, before, type_before = [], None, None
    for index, label in enumerate(labels):
        mark, entity_type = _mark_of(label), label[2:]
        if mark in _MARKS:
            if before not in ("B", "I", "M") or mark in ("B", "S", "U") or entity_type != type_before:
                entities.append([entity_type, index, index])
            entities[-1][2] = index
        before, type_before = mark, entity_type
    return [tuple(entity) for entity in entities]


def entity_metrics(predictions, references):
    """Return precision, recall and f1 of whole entities and accuracy of words, as CoNLL's script counts them: an entity
    is right when its type, first and last word are. Predictions and references are sentences of label names."""
    predicted, expected = (
        {(sentence, *entity) for sentence, labels in enumerate(sentences) for entity in find_entities(labels)}
        for sentences in (predictions, references)
    )
    right = len(predicted & expected)
    precision, recall = right / max(1, len(predicted)), right / max(1, len(expected))
    pairs = list(zip(chain(*predictions), chain(*references), strict=True))
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * right / max(1, len(predicted) + len(expected)),
        "accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs)),
    }
