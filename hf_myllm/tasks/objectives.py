"""Rows into inputs and labels: one class per task.

Each has
    specials                              how many positions of a row are not the text's
    isolates                              whether a row's documents do not see each other
    rows(tokens, max_len, stride, name)   the stream cut as the task needs it
    batch(rows, numbers, step, size)      the model's inputs for some rows, a dict of tensors
    forward(model, inputs, counts)        the outputs, whose loss is the sum over all targets divided by counts

`batch` adds empty rows, which no loss counts, up to `size`, so that all micro-batches have one shape. What it draws at
random is a pure function of (seed, step, row); evaluations have no step, and so the same draw each time.
"""

from itertools import chain

import numpy as np
import torch

from ..data.corpus import find_documents, pack_documents
from ..data.packing import DocumentRows, SentencePassages, StridedRows, best_fit, group_offsets
from ..data.sampler import derive_seed, random_uint64
from ..data.streaming import StreamedRows, TokenWindows
from ..data.tokenizer import continues_word, end_of_document, ends_sentence, special_ids
from ..errors import InputError
from .readers import CLASSIFICATION, IGNORED, REGRESSION, Conversations, Questions, Texts, Words

_LOOKED_AT = 20_000_000  # tokens in which a mark must be found
_LONGEST_WORD = 12  # tokens by which a row's last whole word may go beyond the share


def forward(model, inputs, counts):
    """The model's outputs, whose loss is the sum over all targets divided by `counts`, without the tokens' logits."""
    return model(**inputs, **counts, use_cache=False, skip_logits=True)


def build(task, tokenizer, vocab_size, seed, packing="stream", mlm_probability=0.15, whole_word_masking=False):
    """The objective of a task.

    Raises:
        InputError: the tokenizer lacks a token that the task needs.
    """
    if task == "causal":
        if packing == "stream":
            return Causal()
        if tokenizer is None:
            raise InputError(f"packing {packing} needs to know what ends a document: give the data's --tokenizer")
        return Causal({end_of_document(tokenizer)[0], tokenizer.bos_token_id} - {None}, packing)
    if tokenizer is None:
        raise InputError(f"task {task} needs the data's tokenizer, for its mask token: give --tokenizer")
    lacking = [name for name in ("cls_token", "sep_token", "mask_token") if getattr(tokenizer, name) is None]
    if lacking:
        raise InputError(
            f"task {task} needs a tokenizer with {', '.join(lacking)}, which {tokenizer.name_or_path or 'this one'} "
            "does not have: give BERT's, or {train: wordpiece, vocab_size: 8192}"
        )
    kind = MaskedLM if task == "mlm" else SentencePairs
    return kind(tokenizer, vocab_size, seed, mlm_probability, whole_word_masking, packing)


def build_labelled(task, config, packing="best_fit"):
    """The objective of a [`tasks.Task`].

    Args:
        config: the model's configuration.
    """
    if isinstance(task, Conversations):
        return Instruction(task.tokenizer, packing)
    kinds = (Texts, Classification), (Words, TokenClassification), (Questions, QuestionAnswering)
    objective = next(kind for one, kind in kinds if isinstance(task, one))(
        task.labels, config.pad_token_id, getattr(config, "type_vocab_size", 0) > 1
    )
    objective.specials = task.tokenizer.num_special_tokens_to_add(pair=task.is_pair)
    return objective


def targets(batch):
    """The tokens to predict: IGNORED where there is none."""
    return batch["shift_labels"] if "shift_labels" in batch else batch["labels"]


def counts(batch):
    """Over how many things each part of the loss is a mean, by the name of the model's argument for it."""
    found = {"num_items_in_batch": int((targets(batch) != IGNORED).sum())}
    if "next_sentence_label" in batch:
        found["num_pairs_in_batch"] = int((batch["next_sentence_label"] != IGNORED).sum())
    return found


def tokens_read(batch):
    """How many tokens of text a step has read: its targets, or where only some tokens are targets, all but padding."""
    if "shift_labels" in batch:
        return int((batch["shift_labels"] != IGNORED).sum())
    is_row = (batch["labels"] != IGNORED).reshape(len(batch["labels"]), -1).any(dim=1)  # and not one that only fills
    if "attention_mask" in batch:
        return int(batch["attention_mask"][is_row].sum())
    return int(is_row.sum()) * batch["input_ids"].shape[1]


class Causal:
    """Predict each next token.

    Args:
        marks: the tokens that stand between documents, to keep documents apart: the positions restart at each, from
            which the models see where a document begins. A mark is the last thing that a document says and the first
            that the next one reads, so that no target is lost, and a text that starts from nothing starts as in
            training.
        packing: see the recipe's word.
    """

    specials = 0
    forward = staticmethod(forward)

    def __init__(self, marks=(), packing="documents"):
        self.marks, self.packing = sorted(marks), packing
        self.isolates = bool(self.marks) and packing != "pad"

    def rows(self, tokens, max_len, stride, name):
        if isinstance(tokens, TokenWindows):
            return StreamedRows(tokens, max_len, name)
        if self.marks:
            _require_marks(tokens, self.marks, name)
        if self.packing not in ("pad", "best_fit"):
            return StridedRows(tokens, max_len, stride, name)
        self.width = max_len
        spans, first, parts = pack_documents(tokens, self.marks, max_len, 0, self.packing == "best_fit", ahead=1)
        return DocumentRows(tokens, spans, first, 0, name, parts)

    def batch(self, rows, numbers, step=None, size=None):
        """input_ids and shift_labels, (rows, max_len); position_ids too when documents are kept apart. Rows of one
        document each are as long as the longest of them, rounded up."""
        if isinstance(rows, DocumentRows):
            return self._batch_of_spans(rows, numbers, size)
        windows, first = rows.read(numbers)
        inputs, labels = windows[:, :-1], windows[:, 1:].copy()
        labels[np.arange(labels.shape[1]) < first[:, None]] = IGNORED
        batch = {"input_ids": inputs, "shift_labels": labels}
        if self.marks:
            batch["position_ids"] = _positions(np.isin(inputs, self.marks))
        return _tensors(batch, size)

    def _batch_of_spans(self, rows, numbers, size):
        spans = [rows.read(int(number)) for number in numbers]
        width = self.width if self.isolates else _padded(spans, 0, self.width)
        inputs, labels = np.full((len(spans), width), self.marks[0]), np.full((len(spans), width), IGNORED)
        starts = np.zeros(inputs.shape, dtype=bool)
        for row, documents in enumerate(spans):
            place = 0
            for start, stop in documents:
                window = rows.tokens.read(start - 1, stop - start + 1)
                end = place + stop - start
                inputs[row, place:end], labels[row, place:end] = window[:-1], window[1:]
                if rows.loss_mask is not None:
                    labels[row, place:end][rows.loss_mask[start:stop] == 0] = IGNORED
                starts[row, place] = True
                place = end
            starts[row, place : place + 1] = True  # what fills the row is nobody's
        batch = {"input_ids": inputs, "shift_labels": labels}
        if self.isolates:
            batch["position_ids"] = _positions(starts)
        return _tensors(batch, size)


class MaskedLM:
    """Predict masked tokens from what stands on both sides of them (Devlin et al. 2019, section 3.1).

    A row is [CLS] text [SEP]. Of the text's tokens a share is chosen; of those, 80% become [MASK], 10% a random token,
    and 10% stay. Special tokens are never chosen.

    Args:
        vocab_size: of the model.
        share: of the text's tokens to choose, rounded, and at least one a row but where whole words allow none.
        whole_words: choose all tokens of a word or none.
        packing: see the recipe's word.
    """

    specials = 2
    forward = staticmethod(forward)

    def __init__(self, tokenizer, vocab_size, seed, share=0.15, whole_words=False, packing="stream"):
        self.seed, self.share, self.whole_words, self.packing = seed, share, whole_words, packing
        self.isolates = packing in ("documents", "best_fit")
        self.cls, self.sep, self.mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
        self.pad = tokenizer.pad_token_id or 0
        self.ends = [self.sep, end_of_document(tokenizer)[0]]
        self.is_special = np.zeros(vocab_size, dtype=bool)
        self.is_special[[number for number in special_ids(tokenizer) if number < vocab_size]] = True
        self.ordinary = np.flatnonzero(~self.is_special[: len(tokenizer)])
        if whole_words:
            self.joins, self.joinable = continues_word(tokenizer, vocab_size)

    def rows(self, tokens, max_len, stride, name):
        if isinstance(tokens, TokenWindows):
            return StreamedRows(tokens, max_len - self.specials, name, ahead=0)
        if self.packing != "stream":
            _require_marks(tokens, self.ends, name)
        if self.packing not in ("pad", "best_fit"):
            return StridedRows(tokens, max_len - self.specials, stride, name, ahead=0)
        self.width, marks = max_len, sorted({*self.ends, self.cls})
        spans, first, parts = pack_documents(tokens, marks, max_len, self.specials, self.packing == "best_fit", ahead=0)
        return DocumentRows(tokens, spans, first, self.specials, name, parts)

    def batch(self, rows, numbers, step=None, size=None):
        """input_ids (rows, max_len); masked_positions and labels (rows, masked), the same number of slots for each row,
        of which those that a row does not need have the label -100; document_ids and position_ids (rows, max_len) when
        documents are kept apart; attention_mask where rows are as long as the longest of them."""
        if isinstance(rows, DocumentRows):
            return self._batch_of_spans(rows, numbers, step, size)
        windows, first = rows.read(numbers)
        edges = np.full((len(windows), 1), self.cls), np.full((len(windows), 1), self.sep)
        ids = np.concatenate([edges[0], windows, edges[1]], axis=1)
        may_mask = ~self.is_special[ids] & (np.arange(ids.shape[1]) > first[:, None])
        batch = self.mask_some(ids, may_mask, numbers, step)
        if self.isolates:
            starts = ids == self.cls
            starts[:, 1:] |= np.isin(ids[:, :-1], self.ends)  # where no [CLS] stands between
            batch |= {"document_ids": np.cumsum(starts, axis=1), "position_ids": _positions(starts)}
        return _tensors(batch, size)

    def _batch_of_spans(self, rows, numbers, step, size):
        spans = [rows.read(int(number)) for number in numbers]
        width = self.width if self.isolates else _padded(spans, self.specials, self.width)
        ids, documents = np.full((len(spans), width), self.pad), np.zeros((len(spans), width), dtype=np.int64)
        starts = np.zeros(ids.shape, dtype=bool)
        for row, pieces in enumerate(spans):
            place = 0
            for number, (start, stop) in enumerate(pieces, start=1):
                text = np.concatenate([[self.cls], rows.tokens.read(start, stop - start), [self.sep]])
                ids[row, place : place + len(text)], documents[row, place : place + len(text)] = text, number
                starts[row, place] = True
                place += len(text)
            starts[row, place : place + 1] = True
        batch = self.mask_some(ids, ~self.is_special[ids] & (documents > 0), numbers, step)
        if self.isolates:  # what fills the row is a document of its own, number 0
            batch |= {"document_ids": documents, "position_ids": _positions(starts)}
        else:
            batch["attention_mask"] = (documents > 0).astype(np.int64)
        return _tensors(batch, size)

    def mask_some(self, ids, may_mask, numbers, step):
        """Choose among the positions that may be masked, and mask them; inputs, positions and labels."""
        rows, length = ids.shape
        keys = [derive_seed(self.seed, "mask", step, int(number)) for number in numbers]
        draws = random_uint64(keys, 3 * length).reshape(rows, 3, length)
        wanted = np.rint(may_mask.sum(axis=1) * self.share).astype(np.int64)
        wanted = np.maximum(wanted, may_mask.any(axis=1))
        slots = max(1, round(length * self.share)) + (_LONGEST_WORD if self.whole_words else 0)
        if self.whole_words:
            positions, used = self._choose_words(ids, may_mask, draws[:, 0], wanted, slots)
        else:
            # in random order, those that may not be masked last
            order = np.argsort(np.where(may_mask, draws[:, 0] >> np.uint64(1), np.uint64(1 << 63)), axis=1)
            positions, used = order[:, :slots], np.arange(slots) < wanted[:, None]
        positions = np.where(used, positions, 0)
        chosen = np.take_along_axis(ids, positions, axis=1)
        dice = np.take_along_axis(draws[:, 1], positions, axis=1) % np.uint64(10)
        others = self.ordinary[np.take_along_axis(draws[:, 2], positions, axis=1) % np.uint64(len(self.ordinary))]
        replaced = np.where(dice < 8, self.mask, np.where(dice == 8, others, chosen))
        inputs = ids.copy()
        row = np.broadcast_to(np.arange(rows)[:, None], used.shape)[used]
        inputs[row, positions[used]] = replaced[used]
        return {
            "input_ids": inputs,
            "masked_positions": positions,
            "labels": np.where(used, chosen, IGNORED),
        }

    def _choose_words(self, ids, may_mask, draws, wanted, slots):
        positions, used = np.zeros((len(ids), slots), dtype=np.int64), np.zeros((len(ids), slots), dtype=bool)
        begins = may_mask.copy()  # a word begins where a token is not joined to the one before it
        joined = self.joins[ids[:, 1:]] & self.joinable[ids[:, :-1]] & may_mask[:, 1:] & may_mask[:, :-1]
        begins[:, 1:] &= ~joined
        for row, (begin, may) in enumerate(zip(begins, may_mask, strict=True)):
            places = np.flatnonzero(may)
            words = np.split(places, np.flatnonzero(begin[places])[1:]) if len(places) else []
            count = 0
            for number in np.argsort(draws[row, : len(words)]):
                word = words[number]
                # the word that goes beyond the share is taken as often as keeps the share on average; were it always
                # passed over, long words would hardly ever be chosen
                beyond = count + len(word) - wanted[row]
                if beyond <= 0 or (draws[row, -1] % len(word) >= beyond and count + len(word) <= slots):
                    positions[row, count : count + len(word)] = word
                    count += len(word)
                if beyond >= 0:
                    break
            used[row, :count] = True
        return positions, used


class SentencePairs(MaskedLM):
    """Predict masked tokens, and whether the second of two sentences follows the first (Devlin et al. 2019).

    A row is [CLS] A [SEP] B [SEP], padded. A passage of one document is cut between two sentences, at random; A is what
    stands before the cut, half a row at most, and B, half of the time, what stands after it. The other half of the time
    B is what stands after such a cut in a passage of another document. Both are drawn each time, and as long as the
    shorter, so that neither how long B is nor how it ends says where it is from. As in the paper, a "sentence" is any
    span of text; where a passage has no sentence's end, it is cut anywhere.
    """

    specials = 3

    def __init__(self, tokenizer, vocab_size, *settings):
        super().__init__(tokenizer, vocab_size, *settings)
        self.ends_sentence = ends_sentence(tokenizer, vocab_size)

    def rows(self, tokens, max_len, stride, name):
        documents = find_documents(tokens, (self.cls, self.sep))
        return SentencePassages(tokens, documents, max_len - self.specials, name)

    def batch(self, rows, numbers, step=None, size=None):
        """input_ids, token_type_ids and attention_mask (rows, max_len), masked_positions and labels as in [`MaskedLM`],
        and next_sentence_label (rows,): 0 where B follows A."""
        shape = (len(numbers), rows.length + self.specials)
        ids, types, mask = np.full(shape, self.pad), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        follows = np.zeros(len(numbers), dtype=np.int64)
        for row, number in enumerate(numbers):
            a, b, is_next = self.draw_pair(rows, int(number), step)
            text = np.concatenate([[self.cls], a, [self.sep], b, [self.sep]])
            ids[row, : len(text)], mask[row, : len(text)], types[row, len(a) + 2 : len(text)] = text, 1, 1
            follows[row] = not is_next
        may_mask = ~self.is_special[ids] & (mask == 1)
        batch = self.mask_some(ids, may_mask, numbers, step)
        batch |= {"token_type_ids": types, "attention_mask": mask, "next_sentence_label": follows}
        return _tensors(batch, size)

    def draw_pair(self, passages, number, step):
        """Two spans of tokens, and whether the second follows the first in the text."""
        draws = random_uint64([derive_seed(self.seed, "pair", step, number)], 4)[0].tolist()
        half = passages.length // 2
        before, after = self._cut(passages.read(number), draws[0])
        own = passages.document_of(number)
        first, stop = int(passages.first[own]), int(passages.first[own + 1])
        other = draws[2] % (len(passages) - (stop - first))
        foreign = passages.read(other + (stop - first if other >= first else 0))
        start, rest = self._cut(foreign, draws[3])
        rest = rest if len(rest) else start  # a single token
        is_next = draws[1] % 2 == 0 and len(after) > 0
        length = min(half, len(after) or half, len(rest))  # the same whichever is taken
        return before[-half:], (after if is_next else rest)[:length], is_next

    def _cut(self, ids, draw):
        """A passage in two, where one sentence ends and another begins: after a token that ends one, and is not
        followed by such."""
        ends = self.ends_sentence[ids]
        places = np.flatnonzero(ends[:-1] & ~ends[1:]) + 1
        place = places[draw % len(places)] if len(places) else 1 + draw % max(1, len(ids) - 1)
        return ids[:place], ids[place:]


class Labelled:
    """What the tasks of labelled rows share; see data/tasks. Each also has

        loss_sum(outputs, labels, mask)           the loss, summed over all that is to be said
        predictions(outputs, rows, numbers)       what the model says of some rows, one array each
        judged(rows, numbers, predictions)        the metric that judges them, its configuration, and what it compares

    Args:
        labels: a [`tasks.Labels`]; None where what is said is no class.
        pad: the id that fills a row; the model leaves it out by the mask, or by its id after the text.
        has_types: whether the model tells two texts of a row apart by token types.
    """

    specials = 0
    isolates = False

    def __init__(self, labels, pad, has_types):
        self.labels, self.pad, self.has_types = labels, pad, has_types

    def rows(self, examples, max_len, stride, name):
        return examples

    def batch(self, rows, numbers, step=None, size=None):
        """input_ids and attention_mask (rows, as long as the longest), token_type_ids where the model has them, and
        labels, whose shape is the task's."""
        texts = [rows.read(int(number)) for number in numbers]
        width = max([1, *(len(ids) for ids, _ in texts)])
        width = -(-width // 8) * 8 if width > 8 else width
        ids, mask = np.full((len(texts), width), self.pad), np.zeros((len(texts), width), dtype=np.int64)
        types = np.zeros_like(mask)
        for row, (text, second) in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)], types[row, second : len(text)] = text, 1, 1
        batch = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if self.has_types else {})
        batch = _tensors(batch, size)
        labels = torch.from_numpy(self._labels_of(rows, numbers, width))
        missing = len(batch["input_ids"]) - len(labels)
        batch["labels"] = torch.cat([labels, labels.new_full((missing, *labels.shape[1:]), IGNORED)])
        return batch

    def _labels_of(self, rows, numbers, width):
        return np.array(rows.labels[np.asarray(numbers, dtype=np.int64)])

    def forward(self, model, inputs, counts):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        outputs.loss = self.loss_sum(outputs, labels, inputs["attention_mask"]) / counts["num_items_in_batch"]
        return outputs


class Classification(Labelled):
    """Say of a text which class it is, which of several classes hold, or a number.

    Labels are (rows,), or (rows, classes) of 0 and 1.
    """

    def loss_sum(self, outputs, labels, mask):
        logits, is_row = outputs.logits.float(), labels != IGNORED
        if self.labels.kind == CLASSIFICATION:
            return _cross_entropy_sum(logits, labels)
        if self.labels.kind == REGRESSION:
            losses = (logits[:, 0] - labels) ** 2
        else:
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return torch.where(is_row, losses, 0).sum()  # chosen so, no GPU is waited for

    def predictions(self, outputs, rows, numbers):
        """The chance of each class, or the number."""
        logits = outputs.logits.float().cpu()[: len(numbers)]
        if self.labels.kind == REGRESSION:
            return list(logits.numpy())
        return list((logits.softmax(-1) if self.labels.kind == CLASSIFICATION else logits.sigmoid()).numpy())

    def judged(self, rows, numbers, predictions):
        said, labels = np.stack(predictions), np.array(rows.labels[numbers])
        if self.labels.kind == REGRESSION:
            said = said[:, 0]
        else:
            said = said.argmax(-1) if self.labels.kind == CLASSIFICATION else (said > 0.5).astype(np.float32)
        return "classification", self.labels.judged_as, said.tolist(), labels.tolist()


class TokenClassification(Labelled):
    """Say of each word which class it is: labels (rows, tokens), of each word's first token."""

    def _labels_of(self, rows, numbers, width):
        labels = np.full((len(numbers), width), IGNORED)
        for row, number in enumerate(numbers):
            own = rows.labels_of(int(number))
            labels[row, : len(own)] = own
        return labels

    def loss_sum(self, outputs, labels, mask):
        return _cross_entropy_sum(outputs.logits.float().flatten(0, 1), labels.flatten())

    def predictions(self, outputs, rows, numbers):
        """(words, classes), the chance of each class."""
        chances = outputs.logits.float().softmax(-1).cpu().numpy()
        places = [np.flatnonzero(rows.labels_of(int(number)) != IGNORED) for number in numbers]
        return [chances[row, own] for row, own in enumerate(places)]

    def judged(self, rows, numbers, predictions):
        labels = [own[own != IGNORED] for own in map(rows.labels_of, numbers)]
        said, labels = (
            [np.concatenate(parts).tolist() for parts in rows.by_item(numbers, one).values()]
            for one in ([chances.argmax(-1) for chances in predictions], labels)
        )
        if not any(name[:2] in ("B-", "I-") for name in self.labels.names):  # no entities of several words
            return "classification", self.labels.judged_as, list(chain(*said)), list(chain(*labels))
        return "entities", None, *([[self.labels.names[n] for n in one] for one in all_] for all_ in (said, labels))


class QuestionAnswering(Labelled):
    """Say where a text answers a question: labels (rows, 2), the first and the last token, or twice 0, [CLS], where the
    row does not hold the answer (Devlin et al. 2019, section 4.3).

    may_refuse: whether a question may have no answer; None: whether one of those judged has none.
    """

    guesses = 20  # of each row, for the starts and for the ends
    longest = 30  # tokens of an answer
    may_refuse = None

    def loss_sum(self, outputs, labels, mask):
        # what fills a row is no place for an answer, or the loss would depend on the other rows of the batch
        logits = outputs.start_logits, outputs.end_logits
        starts, ends = (one.float().masked_fill(mask == 0, -torch.inf) for one in logits)
        return _cross_entropy_sum(starts, labels[:, 0]) + _cross_entropy_sum(ends, labels[:, 1])

    def predictions(self, outputs, rows, numbers):
        """(guesses, 3), the sum of both logits, and where the answer starts and stops in the text; the first is that of
        no answer, at -1."""
        found = []
        scores = outputs.start_logits.float().cpu().numpy(), outputs.end_logits.float().cpu().numpy()
        for start, end, number in zip(*scores, numbers, strict=False):  # not those that fill the batch
            spans = rows.spans_of(int(number))
            places = np.flatnonzero(spans[:, 0] >= 0)
            first, last = (places[np.argsort(-one[places], kind="stable")[: self.guesses]] for one in (start, end))
            pairs = np.stack(np.meshgrid(first, last, indexing="ij"), axis=-1).reshape(-1, 2)
            pairs = pairs[(pairs[:, 1] >= pairs[:, 0]) & (pairs[:, 1] - pairs[:, 0] < self.longest)]
            sums = start[pairs[:, 0]] + end[pairs[:, 1]]
            best = np.argsort(-sums, kind="stable")[: self.guesses]
            guesses = np.stack([sums[best], spans[pairs[best, 0], 0], spans[pairs[best, 1], 1]], axis=1)
            found.append(np.concatenate([[[start[0] + end[0], -1, -1]], guesses]))
        return found

    def answers(self, rows, numbers, predictions, may_refuse):
        """item -> [(score, text, where it starts)], the best first; "" is no answer. That one counts as the row says
        which is least for it, since each other row of a text only says that the answer is not there."""
        answers = {}
        for item, parts in rows.by_item(numbers, predictions).items():
            context, best = rows.record(item)["context"], {}
            for score, start, stop in np.concatenate([guesses[1:] for guesses in parts]).tolist():
                text = context[int(start) : int(stop)]
                if text not in best or score > best[text][0]:
                    best[text] = score, int(start)
            if may_refuse or not best:
                best[""] = min(float(guesses[0, 0]) for guesses in parts), -1
            found = [(score, text, start) for text, (score, start) in best.items()]
            answers[item] = sorted(found, key=lambda one: -one[0])
        return answers

    def judged(self, rows, numbers, predictions):
        records = {item: rows.record(item) for item in rows.items_of(numbers)}
        may_refuse = self.may_refuse
        if may_refuse is None:
            may_refuse = not all(one["answers"] for one in records.values())
        answers = self.answers(rows, numbers, predictions, may_refuse)
        said, wanted = [], []
        for item, record in records.items():  # by number, for a file may give one id to two questions
            texts, starts = zip(*record["answers"] or [("", -1)], strict=True)
            said.append({"id": str(item), "prediction_text": answers[item][0][1]})
            wanted.append({"id": str(item), "answers": {"text": list(texts), "answer_start": list(starts)}})
        return "answers", None, said, wanted


class Instruction(Causal):
    """Predict the tokens that are to be said, and no others; see [`tasks.Conversations`].

    Args:
        packing: "best_fit", several conversations a row, or "pad", one.
    """

    def __init__(self, tokenizer, packing):
        super().__init__([end_of_document(tokenizer)[0]], packing)

    def rows(self, examples, max_len, stride, name):
        self.width = max_len
        # as a document of [`Causal`] has the mark before it, its first token is only read
        spans = np.stack([examples.starts[:-1] + 1, examples.starts[1:]], axis=1)
        order, first = np.arange(len(spans)), np.arange(len(spans) + 1)
        if self.packing == "best_fit":
            row_of = best_fit(spans[:, 1] - spans[:, 0], max_len)
            order = np.argsort(row_of, kind="stable")
            first = group_offsets(row_of[order])
        rows = DocumentRows(examples.tokens, spans[order], first, 0, name)
        rows.loss_mask = examples.labels
        return rows


def _cross_entropy_sum(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _padded(spans, edges, limit):
    """The width of a batch: its longest row's, rounded up so that there are not too many shapes."""
    longest = max((sum(stop - start + edges for start, stop in row) for row in spans), default=1)
    return min(limit, -(-longest // 8) * 8)


def _require_marks(tokens, marks, name):
    if not np.isin(tokens.read(0, _LOOKED_AT), marks).any():
        raise InputError(
            f"documents cannot be told apart: none of the tokens {marks} that stand between documents is in the first "
            f"{min(_LOOKED_AT, len(tokens)):,} tokens of {name}; write one after each document, or leave out packing"
        )


def _positions(starts):
    """Positions that begin anew at each start."""
    places = np.arange(starts.shape[1])
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)


def _tensors(batch, size):
    """The arrays as tensors, with empty rows up to `size`."""
    tensors = {}
    for name, values in batch.items():
        missing = 0 if size is None else max(0, size - len(values))
        # a row that attends to nothing would be NaN
        fill = IGNORED if "label" in name else 1 if name == "attention_mask" else 0
        filled = np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)], constant_values=fill)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(filled, dtype=np.int64))
    return tensors
