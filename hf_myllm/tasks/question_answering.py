"""Extractive question answering: where a text answers a question (Rajpurkar et al. 2016, 2018)."""

from itertools import zip_longest

import datasets
import numpy as np
import torch

from ..data.columns import BadRowError, check_text, read_text
from ..errors import InputError
from ..terminal import plural
from .base import cross_entropy, require_tokens, show_tokens
from .labelled import PredictionTask

_NO_ANSWER = {"text": [], "answer_start": []}
_NUM_GUESSES = 20  # of each row, for the starts and for the ends


class QuestionAnswering(PredictionTask):
    """Predict the span of a text that answers a question, from SQuAD's format: nested, as in its files, or flat, as on
    the Hub.

    A row is [CLS] question [SEP] context [SEP]. A long context becomes several overlapping rows, `stride` tokens apart
    (default: half of what fits); each has the answer if it holds all of it. The labels of a batch are (rows, 2), the
    first and last token of the answer, or twice 0, [CLS], if the row does not hold the answer (Devlin et al. 2019,
    section 4.3).
    """

    is_pair = True
    is_split_by_context = True
    label_feature = datasets.List(datasets.Value("int64"))
    record_features = datasets.Features(
        {name: datasets.Value("string") for name in ("id", "question", "context")}
        | {
            "answers": {
                "text": datasets.List(datasets.Value("string")),
                "answer_start": datasets.List(datasets.Value("int64")),
            }
        }
    )

    def __init__(self, tokenizer=None, seed=0, **settings):
        super().__init__(tokenizer, seed, **settings)
        self.unanswerable = self.settings.unanswerable  # whether a question may have no answer; None: the data decides
        self._encoded_context = None, None, None  # the last context, its token ids and their offsets

    def prepare_tokenizer(self, is_trained):
        require_tokens(self.name, self.tokenizer, ("cls_token", "sep_token"))
        super().prepare_tokenizer(is_trained)

    # ---- examples and rows

    def load(self, training, validation=None, show_progress=False):
        train_rows, val_rows, stats = super().load(training, validation, show_progress)
        if self.unanswerable is None and train_rows is not None:
            self.unanswerable = stats["train"]["unanswerable"] > 0
            self.resolved_settings["unanswerable"] = self.unanswerable
        return train_rows, val_rows, stats

    def cache_key(self):
        return [*super().cache_key(), self.settings.stride]

    def used_columns(self):
        return ["data", "id", "question", "context", "answers", "is_impossible"]

    def row_features(self):
        return datasets.Features(super().row_features() | {"offsets": datasets.List(datasets.Value("int32"))})

    def read(self, source):
        for where, record in super().read(source):
            if "data" not in record:
                yield where, record
                continue
            position = source.name
            try:
                for article_index, article in enumerate(record["data"], start=1):
                    for index, paragraph in enumerate(article["paragraphs"], start=1):
                        position = f"{source.name} article {article_index} paragraph {index}"
                        for count, question in enumerate(paragraph["qas"], start=1):
                            name = f"{position} question {question.get('id', count)}"
                            yield name, {**question, "context": paragraph["context"]}
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{position} is not in SQuAD's format, data > paragraphs > context and qas: {error!r:.100}"
                ) from None

    def texts(self, record, where):
        question, context = (read_text(record, where, name) for name in ("question", "context"))
        if not question.strip():
            raise BadRowError(f"{where} has an empty question")
        return [question.strip(), context]

    def parse(self, record, where):
        question, context = self.texts(record, where)
        name = check_text(str(record.get("id", where)), where)
        answers = parse_answers(record, where, context) if self.reads_labels else _NO_ANSWER
        kept = {"id": name, "question": question, "context": context, "answers": answers}
        return {"where": where, "record": kept, "key": context}  # all questions on a context are held out, or none

    def update_stats(self, stats, example):
        stats["unanswerable"] = stats.get("unanswerable", 0) + (not example["record"]["answers"]["text"])

    def tokenize(self, examples):
        questions = [example["record"]["question"] for example in examples]
        return self.backend().encode_batch(questions, add_special_tokens=False)

    def example_rows(self, example, encoding):
        where, context = example["where"], example["record"]["context"]
        if self._encoded_context[0] != context:  # consecutive questions often share a context
            encoded = self.tokenizer.backend_tokenizer.encode(context, add_special_tokens=False)
            self._encoded_context = context, encoded.ids, np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
        _, ids, offsets = self._encoded_context
        question = [self.tokenizer.cls_token_id, *encoding.ids, self.tokenizer.sep_token_id]
        room = self.max_len - len(question) - 1
        if room < 1:
            raise BadRowError(
                f"{where}: the question has {len(encoding.ids)} tokens, and max_len {self.max_len} leaves none for the "
                "text; raise max_len"
            )
        if not ids:
            raise BadRowError(f"{where}: the text has no tokens")
        answer = answer_tokens(example, offsets)
        step = self.window_step(room)
        rows = []
        for begin in range(0, max(1, len(ids) - room + step), step):
            window = ids[begin : begin + room]
            outside = np.full((len(question), 2), -1)
            window_offsets = np.concatenate([outside, offsets[begin : begin + room], [[-1, -1]]])
            is_inside = answer is not None and begin <= answer[0] and answer[1] < begin + len(window)
            labels = [token - begin + len(question) for token in answer] if is_inside else [0, 0]
            row = {"input_ids": [*question, *window, self.tokenizer.sep_token_id], "second_text": len(question)}
            rows.append(row | {"labels": labels, "offsets": window_offsets.flatten()})
        return rows, len(rows) > 1

    # ---- loss, predictions, metrics

    def loss_sum(self, outputs, labels, mask):
        # padding cannot hold the answer; with it the loss would depend on the other rows of the batch
        logits = outputs.start_logits, outputs.end_logits
        starts, ends = (values.float().masked_fill(mask == 0, -torch.inf) for values in logits)
        return cross_entropy(starts, labels[:, 0]) + cross_entropy(ends, labels[:, 1])

    def predictions(self, outputs, rows, indices):
        """Return guesses (guesses, 3) of each row: the sum of both logits, and the start and stop of the answer in the
        text. The first guess is that there is no answer, at -1."""
        predictions = []
        scores = outputs.start_logits.float().cpu().numpy(), outputs.end_logits.float().cpu().numpy()
        for start, end, index in zip(*scores, indices, strict=False):  # without the rows that fill the batch
            offsets = rows.token_offsets(index)
            positions = np.flatnonzero(offsets[:, 0] >= 0)
            firsts, lasts = (
                positions[np.argsort(-logits[positions], kind="stable")[:_NUM_GUESSES]] for logits in (start, end)
            )
            pairs = np.stack(np.meshgrid(firsts, lasts, indexing="ij"), axis=-1).reshape(-1, 2)
            lengths = pairs[:, 1] - pairs[:, 0]
            pairs = pairs[(lengths >= 0) & (lengths < self.settings.max_answer_len)]
            sums = start[pairs[:, 0]] + end[pairs[:, 1]]
            best = np.argsort(-sums, kind="stable")[:_NUM_GUESSES]
            guesses = np.stack([sums[best], offsets[pairs[best, 0], 0], offsets[pairs[best, 1], 1]], axis=1)
            predictions.append(np.concatenate([[[start[0] + end[0], -1, -1]], guesses]))
        return predictions

    def answers(self, rows, indices, predictions, unanswerable):
        """Return a dict of an example's index to its (score, text, start), best first; the text "" is no answer.

        The score of no answer is the lowest over the example's rows, since most rows of a long context do not hold the
        answer.
        """
        answers = {}
        for example, parts in rows.group_by_example(indices, predictions).items():
            context, best = rows.records[example]["context"], {}
            for score, start, stop in np.concatenate([guesses[1:] for guesses in parts]).tolist():
                text = context[int(start) : int(stop)]
                if text not in best or score > best[text][0]:
                    best[text] = score, int(start)
            if unanswerable or not best:
                best[""] = min(float(guesses[0, 0]) for guesses in parts), -1
            candidates = [(score, text, start) for text, (score, start) in best.items()]
            answers[example] = sorted(candidates, key=lambda candidate: -candidate[0])
        return answers

    def metric_inputs(self, rows, indices, predictions):
        records = {example: rows.records[example] for example in sorted(set(rows.example[indices].tolist()))}
        unanswerable = self.unanswerable
        if unanswerable is None:
            unanswerable = not all(record["answers"]["text"] for record in records.values())
        answers = self.answers(rows, indices, predictions, unanswerable)
        predicted, references = [], []
        for example, record in records.items():  # by index, since two questions of a file may have one id
            expected = record["answers"] if record["answers"]["text"] else {"text": [""], "answer_start": [-1]}
            predicted.append({"id": str(example), "prediction_text": answers[example][0][1]})
            references.append({"id": str(example), "answers": expected})
        return predicted, references

    @staticmethod
    def compute_metrics(predictions, references):
        """Return exact_match and f1 (shares from 0 to 1) as SQuAD's script counts them: the best of several references;
        case, punctuation and articles do not count, and no answer is the text ""."""
        from torchmetrics.functional.text import squad  # slow to import, and not every run needs it

        scores = squad(predictions, references)
        return {"exact_match": float(scores["exact_match"]) / 100, "f1": float(scores["f1"]) / 100}

    def describe_predictions(self, rows, predictions):
        """Yield the id and question of each example with its answer, score and start, and the five best guesses."""
        answers = self.answers(rows, np.arange(len(rows)), predictions, bool(self.unanswerable))
        for example, candidates in answers.items():
            scores = np.array([score for score, _, _ in candidates])
            scores = np.exp(scores - scores.max())
            scores = (scores / scores.sum()).tolist()
            guesses = [
                {"answer": text, "score": score, "start": start}
                for (_, text, start), score in zip(candidates, scores, strict=True)
            ]
            question = {name: rows.records[example][name] for name in ("id", "question")}
            yield question | guesses[0] | {"guesses": guesses[:5]}

    def summary_lines(self, train_rows, val_rows, stats):
        lines = super().summary_lines(train_rows, val_rows, stats)
        return lines + [f"{plural(stats['unanswerable'], 'question')} without an answer"] * bool(
            stats.get("unanswerable")
        )

    def describe_target(self, batch, index):
        first, last = batch["labels"][index].tolist()
        if not first:
            return "that the row does not hold the answer"
        return show_tokens(self.tokenizer, batch["input_ids"][index][first : last + 1])


def parse_answers(record, where, context):
    """Return the answers of a record as SQuAD has them, a dict of lists of text and answer_start; empty without answer.

    Raises:
        BadRowError: the answers are not in SQuAD's format, or do not stand where they should.
    """
    answers, is_impossible = record.get("answers"), record.get("is_impossible") or False
    if is_impossible not in (False, True):
        raise BadRowError(f"{where}: is_impossible is {is_impossible!r:.40}, and must be true or false")
    if is_impossible:
        return _NO_ANSWER
    if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):  # as in SQuAD's files
        answers = {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}
    lists = [answers.get(name) for name in ("text", "answer_start")] if isinstance(answers, dict) else []
    if len(lists) != 2 or not all(isinstance(values, list) for values in lists):
        raise BadRowError(f"{where} has no answers, lists of text and answer_start; empty lists mean no answer")
    for text, start in zip_longest(*lists):
        if type(start) is not int or not isinstance(text, str) or not text:
            raise BadRowError(f"{where} has an answer {text!r:.60} at {start!r}: it needs a text and a number")
        found = context[start : start + len(text)] if start >= 0 else ""
        if found != text:
            raise BadRowError(
                f"{where}: the answer {text!r:.60} does not stand at {start}, where the text has {found!r:.60}"
            )
    return dict(zip(("text", "answer_start"), lists, strict=True))


def answer_tokens(example, offsets):
    """Return the first and last token of an example's first answer, or None if it has no answer."""
    answers = example["record"]["answers"]
    if not answers["text"]:
        return None
    text, start = answers["text"][0], answers["answer_start"][0]
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))
    if not len(inside):
        raise BadRowError(f"{example['where']}: the answer {text!r:.60} has no tokens")
    return int(inside[0]), int(inside[-1])
