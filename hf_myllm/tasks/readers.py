"""Labelled data: what is given, and what is to be said of it.

A task is a class with

    read(source)           (where, row) of each row, in the columns that the task knows
    texts(row, where)      what a row has of text, checked
    item(row, where)       the row, checked, as the task needs it
    unit(item)             what may not stand on both sides when a part is held out
    encode(items)          many items through the tokenizer at once, one result each
    examples(item, code)   the rows to train on that come of one item: one, or several of a long text; and whether it
                           was longer than a row
    record(item)           what is needed of an item beside its rows
    account(records)       what to remember of all of them

See data/examples for what becomes of a whole source.
"""

from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from ..data.readers import check_text, read_conll, read_rows
from ..data.tokenizer import end_of_document, special_ids
from ..data.tokenizer import fingerprint as tokenizer_fingerprint
from ..errors import InputError, first_line
from .examples import BadRow, Example

IGNORED = -100  # no label: what torch's cross-entropy, and with it transformers, leaves out of the loss
CLASSIFICATION = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"


@dataclass(frozen=True)
class Labels:
    """What may be said.

    Args:
        kind: CLASSIFICATION, MULTI_LABEL or REGRESSION, as the stock configurations have it.
        names: of the classes, in the order of their numbers; none for a regression.
    """

    kind: str
    names: tuple = ()

    @property
    def count(self):
        return len(self.names) or 1

    @property
    def judged_as(self):
        """The configuration of the metric: of two classes, one is the positive."""
        return "binary" if self.kind == CLASSIFICATION and self.count == 2 else self.kind

    @property
    def is_hot(self):
        """Whether several classes are told by a list of 0 and 1 rather than by their names."""
        return self.kind == MULTI_LABEL and self.names == _unnamed(self.count)

    def number(self, value, where):
        """The number of a class.

        Raises:
            BadRow: it is missing, or none of the classes.
        """
        if value is None or value == "":
            raise BadRow(f"{where} has no label")
        name = _name(value, where)
        if name not in self.names and f"LABEL_{name}" in self.names:  # what a class is called that nobody has named
            name = f"LABEL_{name}"
        if name not in self.names:
            known = ", ".join(self.names[:10]) + (" ..." if len(self.names) > 10 else "")
            raise BadRow(f"{where}: the label {name!r} is not in the training data, which has {known}")
        return self.names.index(name)

    def encode(self, value, where):
        """A label as numbers: of a class, 0 and 1 for each class, or what a regression is to give."""
        if self.kind == CLASSIFICATION:
            return self.number(value, where)
        if value is None or value == "":
            raise BadRow(f"{where} has no label")
        if self.kind == REGRESSION:
            return _number(value, where)
        chosen = value if isinstance(value, (list, dict)) else [value]
        if self.is_hot and not isinstance(value, dict) and not all(isinstance(one, str) for one in chosen):
            if not _is_hot(value) or len(value) != self.count:
                raise BadRow(f"{where}: the label {value!r:.80} is not a list of {self.count} numbers, 0 or 1 each")
            return [float(held) for held in value]
        if isinstance(chosen, dict):  # of several columns
            for name, held in chosen.items():
                if _number(held, where) not in (0, 1):
                    raise BadRow(
                        f"{where}: column {name!r} has {held!r:.40}, where a class holds by 1 and does not by 0"
                    )
            chosen = [name for name, held in chosen.items() if _number(held, where)]
        numbers = {self.number(one, where) for one in chosen}
        return [float(number in numbers) for number in range(self.count)]


class Task:
    """What the tasks share.

    Args:
        tokenizer: of the fast kind.
        max_len: tokens of a row.
        labels: a [`Labels`], once they are known.
        is_labelled: whether rows have labels, or predictions are asked for.
    """

    per_token = False  # whether each token has a label
    is_pair = False  # whether a row is two texts
    columns = ()

    def __init__(self, tokenizer, max_len, labels=None, is_labelled=True, **columns):
        self.tokenizer, self.max_len, self.labels, self.is_labelled = tokenizer, max_len, labels, is_labelled
        for name, default in self.columns:
            setattr(self, name, columns.get(name) or default)

    def key(self):
        """What examples depend on beside their source."""
        names = [getattr(self, name) for name, _ in self.columns]
        labels = (self.labels.kind, self.labels.names) if self.labels else None
        specials = self.tokenizer.special_tokens_map
        return [type(self).__name__, tokenizer_fingerprint(self.tokenizer), specials, self.max_len, labels, names]

    def read(self, source):
        return read_rows(source)

    def unit(self, item):
        return None  # each of its own

    def record(self, item):
        """What is needed of an item beside its rows: to judge it, or to show what a prediction is of."""

    def account(self, records):
        return {}

    def _find_labels(self, source, kind, skip):
        """The labels of a source, sorted; numbers by their size.

        `_labels_at` gives those of a row, each with its place: several in a list, or one.
        """
        names, first, hot = {}, None, set()
        for where, row in self.read(source):
            try:
                self.texts(row, where)
                found = self._labels_at(row, where)
                for one, place in found if isinstance(found, list) else [found]:
                    if one is None or one == "":
                        raise BadRow(f"{place} has no label")
                kind = kind or (MULTI_LABEL if isinstance(found, list) else CLASSIFICATION)
                is_hot = kind == MULTI_LABEL and _is_hot([one for one, _ in found])
                if found or kind != MULTI_LABEL:  # an empty list is of either kind
                    hot.add(len(found) if is_hot else None)
                if is_hot:  # unless other rows say that these are numbers of classes
                    found = [(int(one), place) for one, place in found]
                for one, place in found if isinstance(found, list) else [found]:
                    first = first or (type(one), place)
                    if type(one) is not first[0]:
                        raise BadRow(
                            f"{place}: the label {one!r} is of another type than that of {first[1]}; write all of them "
                            "alike"
                        )
                    names[_name(one, place)] = None
            except BadRow:
                if not skip:
                    raise
        if len(hot) == 1 and None not in hot:
            return Labels(MULTI_LABEL, _unnamed(hot.pop()))
        if len(names) < 2:
            count = f"{len(names)} label{'s' * (len(names) != 1)}"
            raise InputError(f"{source.name} has {count}: there is nothing to tell apart")
        return Labels(
            kind, tuple(sorted(names, key=lambda name: (0, int(name), "") if _is_int(name) else (1, 0, name)))
        )

    def _backend(self, truncated=False):
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        if truncated:
            backend.enable_truncation(self.max_len)
        else:
            backend.no_truncation()
        return backend

    def _text(self, row, where, column, flag):
        text = self._cell(row, where, column, flag)
        if not isinstance(text, str):
            raise BadRow(f"{where}: column {column!r} does not hold text: {text!r:.80}")
        return _checked(text, where)

    @staticmethod
    def _cell(row, where, column, flag=None):
        if column not in row:
            hint = f"; name it with --{flag}" if flag else ""
            raise BadRow(f"{where} has no column {column!r}, but {', '.join(map(repr, row))}{hint}")
        return row[column]


class Texts(Task):
    """Texts, or pairs of them, of which something is to be said; what is longer than a row is cut."""

    columns = (("text_column", "text"), ("text_pair_column", None), ("label_column", "label"))

    @property
    def is_pair(self):
        return self.text_pair_column is not None

    def texts(self, row, where):
        text = self._text(row, where, self.text_column, "text_column")
        if not self.text_pair_column:
            return [text]
        return [text, self._text(row, where, self.text_pair_column, "text_pair_column")]

    def item(self, row, where):
        text = self.texts(row, where)
        text = tuple(text) if len(text) > 1 else text[0]
        return text, self.labels.encode(self.label_of(row, where), where) if self.is_labelled else 0

    def record(self, item):
        if not self.is_labelled:
            texts = item[0] if isinstance(item[0], tuple) else (item[0],)
            return dict(zip((self.text_column, self.text_pair_column), texts, strict=False))

    def label_of(self, row, where):
        if isinstance(self.label_column, list):
            return {name: self._cell(row, where, name, "label_column") for name in self.label_column}
        return self._cell(row, where, self.label_column, "label_column")

    def find_labels(self, source, kind=None, skip=False):
        """The labels of a training set, sorted; numbers by their size. Sets and returns them.

        Raises:
            InputError: a row has none, or labels of different types.
        """
        if kind == REGRESSION:
            self.labels = Labels(kind)
        elif isinstance(self.label_column, list):
            if len(set(self.label_column)) < len(self.label_column):
                raise InputError(f"label_column names a column twice: {', '.join(self.label_column)}")
            self.labels = Labels(MULTI_LABEL, tuple(self.label_column))
        else:
            self.labels = self._find_labels(source, kind, skip)
        return self.labels

    def _labels_at(self, row, where):
        value = self.label_of(row, where)
        return [(one, where) for one in value] if isinstance(value, list) else (value, where)

    def encode(self, items):
        encoded = self._backend(truncated=True).encode_batch([text for text, _ in items])
        self._backend()
        return encoded

    def examples(self, item, encoding):
        ids = encoding.ids or end_of_document(self.tokenizer)[:1]  # of a text of no tokens
        types = encoding.type_ids
        return [Example(ids, types.index(1) if 1 in types else len(ids), item[1])], bool(encoding.overflowing)


class Words(Task):
    """Sentences whose words have labels. The first token of a word stands for it; a sentence that is longer than a row
    goes into several, cut between words, so that each word is judged once."""

    per_token = True
    columns = (("text_column", "tokens"), ("label_column", "label"))

    def read(self, source):
        if source.format == "text":
            return read_conll(source, self.text_column, self.label_column)
        return read_rows(source)

    def texts(self, row, where):
        return [" ".join(self._words_of(row, where))]

    def item(self, row, where):
        words = self._words_of(row, where)
        return words, self._labels_of(row, where, words) if self.is_labelled else [0] * len(words)

    def _words_of(self, row, where):
        words = self._cell(row, where, self.text_column, "text_column")
        if isinstance(words, str) and not self.is_labelled:
            words = words.split()
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise BadRow(f"{where}: column {self.text_column!r} does not hold a list of words: {words!r:.80}")
        if not words:
            raise BadRow(f"{where} has no words")
        return [_checked(word, where) for word in words]

    def _labels_of(self, row, where, words):
        labels = self._cell(row, where, self.label_column, "label_column")
        if not isinstance(labels, list) or len(labels) != len(words):
            found = f"{len(labels)} labels" if isinstance(labels, list) else "no list of labels"
            raise BadRow(f"{where} has {len(words)} words, and {found}")
        places = (f"{where}, word {number} ({word!r:.40})" for number, word in enumerate(words, start=1))
        return [self.labels.number(label, place) for label, place in zip(labels, places, strict=True)]

    def find_labels(self, source, kind=None, skip=False):
        """See [`Texts.find_labels`]."""
        self.labels = self._find_labels(source, CLASSIFICATION, skip)
        return self.labels

    def _labels_at(self, row, where):
        labels = self._cell(row, where, self.label_column, "label_column")
        labels = labels if isinstance(labels, list) else [labels]
        return [(one, f"{where}, word {number}") for number, one in enumerate(labels, start=1)]

    def record(self, item):
        if not self.is_labelled:
            return {self.text_column: item[0]}

    def encode(self, items):
        return self._backend().encode_batch([words for words, _ in items], is_pretokenized=True)

    def examples(self, item, encoding):
        words, labels = item
        missing = set(range(len(words))) - set(encoding.word_ids)
        if not missing and len(encoding.ids) <= self.max_len:
            return [self._example(encoding, labels)], False
        # a word that the tokenizer makes nothing of is an unknown one
        unknown = self.tokenizer.unk_token or self.tokenizer.decode(end_of_document(self.tokenizer)[:1])
        words = [unknown if number in missing else word for number, word in enumerate(words)]
        lengths = np.bincount([w for w in encoding.word_ids if w is not None], minlength=len(words)).clip(min=1)
        backend = self._backend(truncated=True)
        room = self.max_len - backend.num_special_tokens_to_add(False)
        begins, used = [0], 0
        for number, length in enumerate(lengths):
            if used and used + length > room:
                begins, used = [*begins, number], 0
            used += length
        pieces = list(zip(begins, [*begins[1:], len(words)], strict=True))
        found = [self._example(backend.encode(words[a:b], is_pretokenized=True), labels[a:b]) for a, b in pieces]
        self._backend()
        return found, len(pieces) > 1

    @staticmethod
    def _example(encoding, labels):
        said, before = [], None
        for word in encoding.word_ids:
            said.append(IGNORED if word is None or word == before else labels[word])
            before = word
        return Example(encoding.ids, len(encoding.ids), said)


class Questions(Task):
    """Questions and the texts that hold the answers, in SQuAD's format (Rajpurkar et al. 2016, 2018): nested, as its
    files are, or a row for each question, as on the Hub. A row is [CLS] question [SEP] context [SEP]; a long context
    goes into several rows that overlap, each with the answer if it holds all of it.

    Args:
        stride: tokens of context from the start of one row to the start of the next; None: half of what fits.
    """

    is_pair = True

    def __init__(self, *settings, stride=None, **named):
        super().__init__(*settings, **named)
        if self.tokenizer and (self.tokenizer.cls_token_id is None or self.tokenizer.sep_token_id is None):
            raise InputError(
                "task question_answering needs a tokenizer with cls_token and sep_token: give BERT's, or "
                "{train: wordpiece, vocab_size: 8192}"
            )
        self.stride, self._context = stride, (None, None)

    def key(self):
        return [*super().key(), self.stride]

    def read(self, source):
        for where, row in read_rows(source):
            if "data" not in row:
                yield where, row
                continue
            place = source.name
            try:
                for number, article in enumerate(row["data"], start=1):
                    for part, paragraph in enumerate(article["paragraphs"], start=1):
                        place = f"{source.name} article {number} paragraph {part}"
                        for count, question in enumerate(paragraph["qas"], start=1):
                            name = f"{place} question {question.get('id', count)}"
                            yield name, {**question, "context": paragraph["context"]}
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{place} is not in SQuAD's format, data > paragraphs > context and qas: {error!r:.100}"
                ) from None

    def texts(self, row, where):
        question, context = (self._text(row, where, name, None) for name in ("question", "context"))
        if not question.strip():
            raise BadRow(f"{where} asks nothing")
        return [question.strip(), context]

    def item(self, row, where):
        question, context = self.texts(row, where)
        name = _checked(str(row.get("id", where)), where)
        item = {"where": where, "id": name, "question": question, "context": context}
        return item | {"answers": self._answers_of(row, where, context) if self.is_labelled else None}

    @staticmethod
    def _answers_of(row, where, context):
        answers, is_impossible = row.get("answers"), row.get("is_impossible") or False
        if is_impossible not in (False, True):
            raise BadRow(f"{where}: is_impossible is {is_impossible!r:.40}, and must be true or false")
        if is_impossible:
            return []
        if isinstance(answers, list) and all(isinstance(one, dict) for one in answers):  # as in files
            answers = {name: [one.get(name) for one in answers] for name in ("text", "answer_start")}
        lists = [answers.get(name) for name in ("text", "answer_start")] if isinstance(answers, dict) else []
        if len(lists) != 2 or not all(isinstance(one, list) for one in lists):
            raise BadRow(f"{where} has no answers, lists of text and answer_start; what has none has empty ones")
        found = []
        for text, start in zip_longest(*lists):
            if type(start) is not int or not isinstance(text, str) or not text:
                raise BadRow(f"{where} has an answer {text!r:.60} at {start!r}: it needs a text and a number")
            if start < 0 or start + len(text) > len(context):
                raise BadRow(
                    f"{where}: the answer {text!r:.60} at {start} lies beyond the {len(context)} characters of the text"
                )
            if context[start : start + len(text)] != text:
                raise BadRow(
                    f"{where}: the answer {text!r:.60} does not stand at {start}, where the text has "
                    f"{context[start : start + len(text)]!r:.60}"
                )
            found.append((text, start))
        return found

    def unit(self, item):
        return hash(item["context"])

    def record(self, item):
        return {name: item[name] for name in ("id", "question", "context", "answers")}

    def account(self, records):
        return {"unanswerable": sum(not one["answers"] for one in records)}

    def encode(self, items):
        return self._backend().encode_batch([item["question"] for item in items], add_special_tokens=False)

    def examples(self, item, encoding):
        if self._context[0] != item["context"]:  # many questions in a row ask one text
            found = self.tokenizer.backend_tokenizer.encode(item["context"], add_special_tokens=False)
            self._context = item["context"], (found.ids, np.array(found.offsets, dtype=np.int64).reshape(-1, 2))
        ids, spans = self._context[1]
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        question = [cls, *encoding.ids, sep]
        room = self.max_len - len(question) - 1
        if room < 1:
            raise BadRow(
                f"{item['where']}: the question has {len(encoding.ids)} tokens, and max_len {self.max_len} leaves none "
                "for the text"
            )
        if not ids:
            raise BadRow(f"{item['where']}: the text has no tokens")
        first = last = None
        if item["answers"]:
            text, start = item["answers"][0]
            inside = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < start + len(text)))
            if not len(inside):
                raise BadRow(f"{item['where']}: the answer {text!r:.60} has no tokens")
            first, last = int(inside[0]), int(inside[-1])
        step = min(self.stride or max(1, room // 2), room)
        begins = range(0, max(1, len(ids) - room + step), step)
        found = []
        for begin in begins:
            window = ids[begin : begin + room]
            outside = np.full((len(question), 2), -1)
            places = np.concatenate([outside, spans[begin : begin + room], [[-1, -1]]])
            holds = first is not None and begin <= first and last < begin + len(window)
            said = [place - begin + len(question) for place in (first, last)] if holds else [0, 0]  # else [CLS]
            found.append(Example([*question, *window, sep], len(question), said, places))
        return found, len(found) > 1


class Conversations(Task):
    """Prompts with their completions, or chats in the form that the tokenizer's template gives them, of which only what
    is to be said is learned: the completion, or the turns of the assistant; then the end."""

    per_token = True

    def __init__(self, *settings, **named):
        super().__init__(*settings, **named)
        if self.tokenizer:
            specials = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            opening = {getattr(self.tokenizer, f"{name}_token_id") for name in ("unk", "bos", "cls", "pad", "mask")}
            # what may close a turn; the end of text may be the beginning too, as GPT-2's
            self.closing = (specials | set(special_ids(self.tokenizer))) - opening | {self.tokenizer.eos_token_id}
        self.ends, self.unlearned = set(), 0  # tokens that close turns; turns that are only read

    def texts(self, row, where):
        if isinstance(row.get("prompt"), str):
            return [self._text(row, where, name, None) for name in ("prompt", "completion") if name in row]
        turns = row.get("messages") or [*(row.get("prompt") or []), *(row.get("completion") or [])]
        return [one["content"] for one in turns if isinstance(one, dict) and isinstance(one.get("content"), str)]

    def key(self):
        return [*super().key(), self.tokenizer.chat_template]

    def account(self, records):
        return {"ends": sorted(self.ends), "unlearned": self.unlearned}

    def item(self, row, where):
        """(where, text, the spans of it that are learned, whether its end is given by the text)."""
        if "messages" not in row and not {"prompt", "completion"} <= set(row):
            raise BadRow(f"{where} has neither messages nor prompt and completion, but {', '.join(map(repr, row))}")
        if "messages" in row:
            return where, *self._chat(row["messages"], 0, where), True
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(prompt, list):
            if not isinstance(completion, list):
                raise BadRow(
                    f"{where}: the prompt is a list of turns, and so must the completion be: {completion!r:.80}"
                )
            return where, *self._chat([*prompt, *completion], len(prompt), where), True
        prompt = self._text(row, where, "prompt", None)
        if completion is None or completion == "":
            raise BadRow(f"{where} has no completion")
        completion = self._text(row, where, "completion", None)
        return where, prompt + completion, [(len(prompt), len(prompt) + len(completion))], False

    def _chat(self, messages, first, where):
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise BadRow(f"{where}: messages is not a list of turns, each with role and content: {messages!r:.80}")
        for number, one in enumerate(messages, start=1):
            for name in ("role", "content"):
                if not isinstance(one.get(name), str):
                    raise BadRow(f"{where}, turn {number} has no {name} of text: {one!r:.80}")
                _checked(one[name], where)
        turns = [number for number, one in enumerate(messages) if one["role"] == "assistant" and number >= first]
        if not turns:
            raise BadRow(f"{where} has no assistant's turn: there is nothing to learn")
        whole, spans, end = self._rendered(messages, where), [], self.tokenizer.eos_token or ""
        for turn in turns:
            try:
                before = self._rendered(messages[:turn], where, add_generation_prompt=True)
            except BadRow:
                if turn:
                    raise
                before = ""  # a template that has no empty chat
            after = self._rendered(messages[: turn + 1], where)
            if end and not whole.startswith(after):  # some templates close the whole with it
                after = after.removesuffix(end)
            # what the template writes otherwise once other turns follow (some leave out old thoughts) is only read
            if whole.startswith(after) and after.startswith(before):
                spans.append((len(before), len(after)))
        self.unlearned += len(turns) - len(spans)
        if not spans:
            raise BadRow(f"{where}: the chat template does not begin an assistant's turn with its generation prompt")
        return whole[: spans[-1][1]], spans

    def _rendered(self, messages, where, **more):
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"{where} is a chat, and the tokenizer {self.tokenizer.name_or_path} has no template for one: give "
                "--chat_template FILE (Jinja, as the Hub's chat models have it)"
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except Exception as error:  # of the template, which is a program
            raise BadRow(f"{where}: the chat template refuses it: {first_line(error)}") from None

    def encode(self, items):
        backend = self._backend()
        chats = iter(backend.encode_batch([text for _, text, _, is_chat in items if is_chat], add_special_tokens=False))
        texts = iter(backend.encode_batch([text for _, text, _, is_chat in items if not is_chat]))
        return [next(chats if is_chat else texts) for *_, is_chat in items]

    def examples(self, item, encoding):
        where, text, spans, _ = item
        ids, places = list(encoding.ids), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        is_text = places[:, 1] > places[:, 0]
        inside = [is_text & (places[:, 1] > start) & (places[:, 0] < stop) for start, stop in spans]
        learned, end = np.logical_or.reduce(inside), end_of_document(self.tokenizer)[0]
        said = [place for place in np.flatnonzero(inside[-1]) if text[slice(*places[place])].strip()]
        ends_itself = bool(said) and ids[said[-1]] in self.closing
        while ids and ids[-1] == end and not learned[-1]:  # of a tokenizer that adds its own
            ids, learned = ids[:-1], learned[:-1]
        if ends_itself:
            self.ends.add(ids[said[-1]])
        else:
            ids, learned = [*ids, end], np.append(learned, True)
        if len(ids) - 1 > self.max_len:
            raise BadRow(f"{where} has {len(ids) - 1} tokens, and max_len is {self.max_len}")
        if not learned[1:].any():
            raise BadRow(f"{where} has nothing to learn")
        return [Example(ids, len(ids), learned.astype(np.int64).tolist())], False


class PlainTexts:
    """All text of labelled rows, to be read as often as one likes; rows that cannot be used are passed over.

    Args:
        name: of the task.
        columns: see the task.
    """

    def __init__(self, sources, name, **columns):
        self.sources, self.task = sources, TASKS[name](None, None, is_labelled=False, **columns)

    def __iter__(self):
        for source in self.sources:
            for where, row in self.task.read(source):
                with suppress(BadRow):
                    yield from self.task.texts(row, where)


TASKS = {
    "classification": Texts,
    "token_classification": Words,
    "question_answering": Questions,
    "instruction": Conversations,
}


def _checked(text, where):
    return check_text(text, where, BadRow)


def _name(value, where):
    if isinstance(value, float) or not isinstance(value, (str, int)):
        raise BadRow(f"{where}: the label {value!r:.80} is not the name or number of a class; problem_type says more")
    return _checked(str(value), where)


def _unnamed(count):
    """What the classes are called that nobody has named."""
    return tuple(f"LABEL_{number}" for number in range(count))


def _is_hot(values):
    """Whether it is a list of 0 and 1, of which one holds for each class."""
    return (
        isinstance(values, list)
        and len(values) > 1
        and all(isinstance(one, (int, float)) and one in (0, 1) for one in values)
    )


def _number(value, where):
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < 1e30 or number == IGNORED:
        raise BadRow(f"{where}: the label {value!r:.80} is not a number to come close to")
    return number


def _is_int(name):
    return name.removeprefix("-").isdecimal() and len(name) < 20
