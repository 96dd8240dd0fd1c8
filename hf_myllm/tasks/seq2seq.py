"""Sequence to sequence: predict a target text from a source text, for example a summary or a translation."""

import copy
from importlib.util import find_spec

import datasets
import numpy as np
import torch

from ..data.columns import BadRowError, read_column, read_text
from ..errors import InputError
from ..generate import decode_target, encode_source, end_tokens, generate_ids
from ..models.auto import num_positions
from ..terminal import plural
from .base import IGNORE_INDEX, cross_entropy, join_segments, padded_width, to_tensors
from .classification import read_lines
from .encoder_decoder import EncoderDecoder
from .labelled import LabelledTask

# Names of the columns of the source and the target, where the recipe does not set them.
_COLUMNS = (
    ("source", "target"),
    ("prompt", "completion"),
    ("text", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
)
_HAS_LIBRARIES = all(map(find_spec, ("sacrebleu", "rouge_score")))
_TRANSLATION = "translation"  # column with a dict of a text in each language


class Seq2Seq(EncoderDecoder, LabelledTask):
    """Predict the target of each source. Both are cut, the source to max_len tokens, the target to `max_target_len`.

    A row of [`LabelledRows`] is the source and, as its second text, the target.
    """

    packings = ("pad",)
    own_columns = ("source", "target")
    generates_predictions = True
    record_features = datasets.Features({"target": datasets.Value("string")})
    target_name = "target tokens"
    length_group_steps = 2  # g2p.yaml learns less per step from batches of one length: 0.50 nats after 400, not 0.43

    @property
    def num_target_positions(self):
        return self.settings.max_target_len

    def configure(self, model_config, max_len):
        super().configure(model_config, max_len)
        longest = self.settings.max_target_len
        self.max_target_len = min(longest, num_positions(model_config) or longest)
        if self.max_target_len <= self.num_special_tokens:
            raise InputError(
                f"max_target_len {self.max_target_len} is too small: each target has {self.num_special_tokens} special "
                "tokens; raise it"
            )
        self.logits_share = self.max_target_len / max_len

    # ---- examples

    def cache_key(self):
        settings, tokenizer = self.settings, self.tokenizer
        languages = getattr(tokenizer, "src_lang", None), getattr(tokenizer, "tgt_lang", None)
        columns = settings.text_column, settings.target_column
        return [*super().cache_key(), columns, settings.source_prefix, self.max_target_len, languages]

    def used_columns(self):
        named = {self.settings.text_column, self.settings.target_column} - {None}
        return [*named, *self.mapped_columns(), _TRANSLATION, *(name for pair in _COLUMNS for name in pair)]

    def read(self, source):
        is_text = source.format == "text" and not self.reads_labels
        column = "source" if self.mapped_columns() else self.text_column
        for where, record in read_lines(source, column) if is_text else super().read(source):
            languages = record.get(_TRANSLATION)
            if isinstance(languages, dict) and not self.mapped_columns():
                record = {name: value for name, value in record.items() if name != _TRANSLATION} | languages
            yield where, record

    def find_columns(self, record, where):
        """Return the names of the columns of the source and of the target, which predictions do not need.

        Raises:
            BadRowError: the recipe does not name them, and they have no usual names.
        """
        text_column, target_column = self.settings.text_column, self.settings.target_column
        if text_column and target_column:
            return text_column, target_column
        for source, target in _COLUMNS:
            fits = (text_column or source) == source and (target_column or target) == target
            if fits and source in record and (target in record or not self.reads_labels):
                return source, target
        if text_column and not self.reads_labels:
            return text_column, "target"
        raise BadRowError(
            f"{where} has the columns {', '.join(map(repr, record))}; name those of the source and the "
            "target with --text_column and --target_column"
        )

    def texts(self, record, where):
        example = self.parse(record, where)
        return [example["source"], example["target"]]

    def parse(self, record, where):
        if self.reads_labels or set(record) != {"source"}:  # lines of text are sources
            record = record | self.map_columns(record, where, () if self.reads_labels else ("target",))
        text_column, target_column = self.find_columns(record, where)
        source = read_text(record, where, text_column, "text_column")
        if not source.strip():
            raise BadRowError(f"{where}: the source, column {text_column!r}, is empty")
        if self.reads_labels:
            if read_column(record, where, target_column, "target_column") in (None, ""):
                raise BadRowError(f"{where}: the target, column {target_column!r}, is empty")
            target = read_text(record, where, target_column)
            kept = {"target": target}
        else:
            target = record.get(target_column)
            target = target if isinstance(target, str) else None
            columns = {text_column: source} | ({} if target is None else {target_column: target})
            kept = {"target": target, "columns": columns}
        return {"source": source, "target": target, "key": source, "record": kept}

    def update_stats(self, stats, example):
        stats["cut_targets"] = stats.get("cut_targets", 0) + example["is_target_cut"]

    def summary_lines(self, train_rows, val_rows, stats):
        cut = (
            ("cut", "source", "max_len", self.max_len),
            ("cut_targets", "target", "max_target_len", self.max_target_len),
        )
        lines = [
            f"{plural(stats[name], text)} longer than {key} {limit}: cut"
            for name, text, key, limit in cut
            if stats.get(name)
        ]
        if self.max_target_len < self.settings.max_target_len:
            lowered = f"max_target_len {self.settings.max_target_len} is lowered to {self.max_target_len}"
            lines.insert(0, f"{lowered}, the model's positions")
        if val_rows is not None and not _HAS_LIBRARIES:
            lines.append('ROUGE, BLEU and chrF need: pip install "hf-myllm[text-metrics]"')
        return lines

    # ---- rows and batches

    def tokenize(self, examples):
        sources = [self.add_prefix(example["source"]) for example in examples]
        sources = self._encode(sources, self.max_len)
        if not self.reads_labels:
            return [(source, ([], False)) for source in sources]
        targets = self._encode_targets([example["target"] for example in examples])
        return list(zip(sources, targets, strict=True))

    def _encode_targets(self, texts):
        try:  # some tokenizers mark the language of a target
            getattr(self.tokenizer, "_switch_to_target_mode", lambda: None)()
            return list(self._encode(texts, self.max_target_len))
        finally:
            getattr(self.tokenizer, "_switch_to_input_mode", lambda: None)()

    def add_prefix(self, text):
        return (self.settings.source_prefix or "") + text

    def _encode(self, texts, length):
        """Return (token ids, whether they were cut) of each text, at most `length`, with the end token."""
        end = self.tokenizer.eos_token_id
        adds_end = end in self.backend().encode("a").ids  # mBART's language is behind it
        for encoding in self.encode_truncated(texts, length if adds_end else length - 1):
            yield encoding.ids if adds_end else [*encoding.ids, end], bool(encoding.overflowing)

    def example_rows(self, example, encoding):
        (source, is_cut), (target, example["is_target_cut"]) = encoding
        row = {"input_ids": source + target, "second_text": len(source), "labels": len(target)}
        return [row], is_cut

    def make_rows(self, data, name, stride=None):
        return data

    def length_keys(self, rows):
        """Sort by the source's length, then by the target's: sources of one length need neither padding nor mask."""
        return lambda indices: rows.second_text[indices] * (1 << 32) + rows.lengths(indices)

    def batch(self, rows, indices, step=None, size=None):
        """Return input_ids and attention_mask (rows, longest source), and labels (rows, longest target)."""
        texts = [rows.read(int(index)) for index in indices]
        sources, targets = [[ids[:start]] for ids, start in texts], [[ids[start:]] for ids, start in texts]
        inputs, segments = join_segments(sources, _width(sources, self.max_len), self.pad)
        labels, _ = join_segments(targets, _width(targets, self.max_target_len), IGNORE_INDEX)
        return to_tensors({"input_ids": inputs, "attention_mask": segments > 0, "labels": labels}, size)

    @property
    def row_tokens(self):
        return self.max_len + self.max_target_len

    def count_tokens(self, batch):
        return super().count_tokens(batch) + self.count_targets(batch)["num_items_in_batch"]

    # ---- loss

    def forward(self, model, inputs, counts):
        """Return the model's outputs; in training with label smoothing (Szegedy et al. 2016), if the recipe asks."""
        smoothing = self.settings.label_smoothing
        if not (smoothing and model.training):
            return super().forward(model, inputs, counts)
        outputs = model(**inputs, use_cache=False)
        logits, labels = outputs.logits.float().flatten(0, 1), inputs["labels"].flatten()
        outputs.loss = cross_entropy(logits, labels, label_smoothing=smoothing) / counts["num_items_in_batch"]
        return outputs

    # ---- generated predictions

    def generation_groups(self, rows, indices, size):
        return equal_length_groups(rows.second_text, indices, size)

    def generate(self, model, rows, indices):
        """Return the texts that the model generates for some rows whose sources have the same length."""
        sources = np.stack([ids[:start] for ids, start in (rows.read(int(index)) for index in indices)])
        outputs = generate_ids(model, torch.from_numpy(sources), self.generation_config(model))
        return [decode_target(self.tokenizer, ids) for ids in outputs]

    def generation_config(self, model):
        """Return the settings of the model's own generation with this task's limits: greedy, or beam search."""
        config = copy.deepcopy(model.generation_config)
        config.update(do_sample=False, temperature=None, top_k=None, top_p=None, max_length=None)
        config.update(num_beams=self.settings.num_beams, max_new_tokens=self.max_target_len - 1)
        config.update(pad_token_id=self.pad, eos_token_id=end_tokens(model, self.tokenizer))
        config.update(decoder_start_token_id=self.find_start(model))
        return config

    def find_start(self, model):
        """Return the token from which the model's class starts a target in training: mBART from its language."""
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:  # M2M100 and Blenderbot
            return self.decoder_start
        ((labels, _),) = self._encode_targets(["a"])
        return int(shift(labels=torch.tensor([labels]))[0, 0])

    def metric_inputs(self, rows, indices, predictions):
        return predictions, [rows.records[int(index)]["target"] for index in rows.example[indices]]

    def compute_metrics(self, predictions, references):
        ids = [self.backend().encode_batch(texts, add_special_tokens=False) for texts in (predictions, references)]
        return text_metrics(predictions, references, *([encoding.ids for encoding in texts] for texts in ids))

    def describe_metrics(self, metrics):
        if "exact_match" not in metrics:
            return ""
        shown = [f"{name} {metrics[name]:.4g}" for name in ("rouge2", "bleu", "chrf") if name in metrics]
        shown += [f"exact match {metrics['exact_match']:.1%}", f"token errors {metrics['token_error_rate']:.1%}"]
        return f"{', '.join(shown)} of {plural(metrics['generated_rows'], 'generated row')}"

    def describe_predictions(self, rows, predictions):
        """Yield the columns of each example, and what the model generated."""
        for record, prediction in zip(rows.records, predictions, strict=True):
            yield record["columns"] | {"prediction": prediction}

    # ---- what a person sees

    def check_prompt(self, text, max_positions):
        encode_source(self.tokenizer, self.add_prefix(text), max_positions)

    def usage(self, run_dir, prompt=None):
        return "predict", f"hf-myllm predict {run_dir} --input FILE"

    def update_generation_config(self, model, stats):
        """Let the published model generate as evaluations do: the library's default are 20 tokens."""
        model.generation_config.update(num_beams=self.settings.num_beams, max_new_tokens=self.max_target_len - 1)
        model.generation_config.decoder_start_token_id = self.find_start(model)

    def sample(self, model, text, **sampling):
        """Return what the model generates for a source, as in an evaluation."""
        ids = encode_source(self.tokenizer, self.add_prefix(text), self.max_len)
        return decode_target(self.tokenizer, generate_ids(model, torch.tensor([ids]), self.generation_config(model))[0])


def equal_length_groups(lengths, indices, size):
    """Return rows in groups of at most `size` rows of equal length, so that none is padded; the longest first.

    Args:
        lengths: (rows,) of all rows.
        indices: the rows to group.
    """
    indices = np.asarray(indices)[np.argsort(-lengths[indices], kind="stable")]
    runs = np.split(indices, np.flatnonzero(np.diff(lengths[indices])) + 1)
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]


def text_metrics(predictions, references, predicted_ids, reference_ids):
    """Return the metrics of generated texts.

    Args:
        predictions, references: sequences of texts.
        predicted_ids, reference_ids: their token ids.
    Returns:
        exact_match: share of texts that are equal but for white space at their ends.
        token_error_rate: edit distance in tokens divided by the tokens of the references.
        generated_rows: the number of texts.
        With sacrebleu and rouge-score: bleu and chrf from 0 to 100; rouge1, rouge2 and rougeL, F1 of stemmed English
        words, from 0 to 1.
    """
    predictions, references = list(predictions), list(references)
    pairs = list(zip(predictions, references, strict=True))
    errors = sum(edit_distance(*ids) for ids in zip(predicted_ids, reference_ids, strict=True))
    metrics = {
        "exact_match": sum(first.strip() == second.strip() for first, second in pairs) / len(pairs),
        "token_error_rate": errors / max(1, sum(map(len, reference_ids))),
        "generated_rows": len(pairs),
    }
    if not _HAS_LIBRARIES:
        return metrics
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    metrics["bleu"] = sacrebleu.corpus_bleu(predictions, [references], force=True).score
    metrics["chrf"] = sacrebleu.corpus_chrf(predictions, [references]).score
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return metrics | {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def edit_distance(first, second):
    """Return the least number of insertions, deletions and replacements that turn one sequence into the other."""
    second, places = np.asarray(second), np.arange(len(second) + 1)
    row = places
    for count, item in enumerate(first, start=1):
        # a replacement or a match, or a deletion; then insertions, one after the other
        best = np.concatenate([[count], np.minimum(row[:-1] + (second != item), row[1:] + 1)])
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])


def _width(rows, limit):
    # short rows, such as words, are not rounded up: half of a row would be padding
    return padded_width([len(ids) for (ids,) in rows], limit, longest_exact=32)
