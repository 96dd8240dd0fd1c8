"""The section of a recipe about its data: files, columns, tokenizer, rows. See sections.py for the others."""

import re
from typing import Literal

from pydantic import model_validator

from ..errors import RecipeError
from .fields import MANY, PathText, Section, Source, Stage, Texts, TrainedTokenizer, changeable, fixed

MLM_TASKS = ("mlm", "mlm_nsp")
CORRUPTION_TASKS = ("span_corruption", "denoising")
TEXT_TASKS = ("causal", *MLM_TASKS, *CORRUPTION_TASKS)
GENERATING_TASKS = ("causal", "instruction", *CORRUPTION_TASKS)
MLM_PROBABILITY = {"denoising": 0.3}  # task -> default of mlm_probability, if it is not 0.15
CLASS_TASKS = ("classification", "token_classification")
LABELLED_TASKS = (*CLASS_TASKS, "question_answering")
TASKS = (*TEXT_TASKS, *LABELLED_TASKS, "instruction", "seq2seq")  # of others the dry run shows all keys


class Data(Section):
    train_file: PathText | list[PathText] | None = changeable(
        None,
        "Training text: .txt files (or any text files, by a glob), .jsonl, .parquet, a folder of one of these, or a "
        ".bin file of token ids. {stdlib} stands for the folder of Python's standard library.",
    )
    val_file: PathText | list[PathText] | dict[str, PathText | list[PathText]] | None = changeable(
        None, "Validation text, in the same formats. Several sets by name: {code: a.txt, prose: b.txt}."
    )
    datasets: list[Source] | None = changeable(
        None,
        "Several weighted sources instead of train_file: a list of {train_file or dataset, weight}, optionally with "
        "dataset_config, dataset_split, dataset_revision, text_column and document. Weights are shares of the rows. "
        "max_epochs limits how often a source is read. With a name, each source has a validation set of its own: its "
        "val_file, or its part that is held out.",
        tasks=TEXT_TASKS,
    )
    mixture_schedule: list[Stage] | None = fixed(
        None,
        "Other weights of the datasets from a step on: a list of {step: 1000, weights: {NAME: WEIGHT}}. Sources that a "
        "stage does not name keep their weights.",
        tasks=TEXT_TASKS,
        needs="datasets",
    )
    weights_by: Literal["rows", "tokens"] = fixed(
        "rows",
        "What the weights of datasets are shares of. It matters where rows differ in length: with packing pad or "
        "best_fit.",
        tasks=TEXT_TASKS,
        needs="datasets",
    )
    dataset: str | None = changeable(None, "A Hugging Face Hub dataset, instead of train_file.")
    dataset_config: str | None = changeable(None, "Configuration of the dataset.", needs="dataset")
    dataset_split: str = changeable("train", "Training split of the dataset.", needs="dataset")
    dataset_revision: str | None = changeable(
        None, "Revision of the dataset: a branch, tag or commit.", needs="dataset"
    )
    text_column: str | None = changeable(
        None,
        "Column with the text in .jsonl, .parquet and Hub data, with the words for token_classification, or with the "
        "source for seq2seq. Default: text, or tokens; for seq2seq see target_column.",
    )
    columns: dict[str, str] | None = changeable(
        None,
        "The data's columns by what they are: {prompt: question, completion: answer}, or {messages: chat}. Default: "
        "found by the shape of the rows.",
        tasks=("instruction", "seq2seq"),
    )
    template: str | dict[str, str] | None = changeable(
        None,
        "Text made of several columns, whose names stand in braces: 'Q: {question}\\nA: {answer}'. For instruction: "
        "{prompt: 'Q: {question}\\nA: ', completion: '{answer}'}; for seq2seq the same of source and target.",
        tasks=(*TEXT_TASKS, "instruction", "seq2seq", "classification"),
    )
    text_pair_column: str | None = changeable(None, "Column with the second text of a pair.", tasks=("classification",))
    target_column: str | None = changeable(
        None,
        "Column with the target. Default, with text_column: source and target, prompt and completion, text, document "
        "or dialogue and summary, or article and highlights. Of a column `translation` these are two languages.",
        tasks=("seq2seq",),
    )
    source_prefix: str | None = fixed(None, "Text before each source, such as 'summarize: '.", tasks=("seq2seq",))
    max_target_len: int = fixed(
        128, "Tokens of a target, at most; also of a generated one.", ge=2, le=MANY, tasks=("seq2seq",)
    )
    label_column: str | list[str] = changeable(
        "label",
        "Column with the label, or with the labels of the words. A list of columns of 0 and 1 makes the task multi-"
        "label.",
        tasks=("classification", "token_classification"),
    )
    labels: Texts | None = fixed(
        None,
        "Names of the classes in the order of the model's outputs; the training data may lack some. Default: those of "
        "the training data, sorted.",
        tasks=CLASS_TASKS,
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = fixed(
        None,
        "Meaning of the labels. Default: single-label, or multi-label if labels are lists.",
        tasks=("classification",),
    )
    unanswerable: bool | None = changeable(
        None,
        "Whether questions may have no answer. Default: true if a training question has none.",
        tasks=("question_answering",),
    )
    max_answer_len: int = changeable(
        30, "Longest predicted answer, in tokens.", ge=1, le=MANY, tasks=("question_answering",)
    )
    chat_template: PathText | None = fixed(
        None, "Jinja file with a chat template; replaces the tokenizer's own.", tasks=("instruction",)
    )
    skip_bad_rows: bool = changeable(
        False,
        "Skip and count invalid labelled examples instead of stopping at the first.",
        tasks=(*LABELLED_TASKS, "instruction", "seq2seq"),
    )
    document: Literal["file", "line"] = changeable("file", "What a document is in a text file.", tasks=TEXT_TASKS)
    deduplicate: bool = changeable(
        False, "Read each text of the training data once: leave out documents that are equal.", tasks=TEXT_TASKS
    )
    max_train_rows: int | None = fixed(
        None,
        "For a quick trial: train on the first rows only (of max_len tokens; of labelled data, those of the file), and "
        "read no more than they and the rows that are held out need.",
        ge=1,
        le=1 << 40,
    )
    max_eval_rows: int | None = changeable(
        None, "The same for validation: its first rows, of each set.", ge=1, le=1 << 40
    )
    val_fraction: float = fixed(
        0.05,
        "Fraction of the documents, or of the rows of each label, held out for validation when there is no val_file.",
        ge=0,
        lt=1,
    )
    bin_dtype: Literal["auto", "uint16", "uint32"] = changeable(
        "auto", "Integer type of a .bin file.", tasks=TEXT_TASKS
    )
    tokenizer: PathText | TrainedTokenizer | None = fixed(
        None,
        "A Hub id or id@revision, a folder, or {train: bpe, vocab_size: 8192} to train one on the training text (bpe, "
        "unigram; wordpiece for BERT; characters, without a vocab_size for all that occur). Default: the tokenizer of "
        "the model in init_from.",
    )
    add_tokens: Texts | None = fixed(
        None, "Tokens to add to the tokenizer; the model of init_from gets an embedding for each."
    )
    max_len: int | None = fixed(
        None,
        "Tokens per row. Default: the model's number of positions; of T5, those that it was trained with (512).",
        ge=1,
        le=MANY,
    )
    stride: int | None = fixed(
        None,
        "Tokens from the start of one training row to the start of the next. Default: a row's length. Of the windows "
        "of a long text (question_answering, and classification with long_texts): default: half of what fits.",
        ge=1,
        le=MANY,
        tasks=("causal", "mlm", "question_answering", "classification"),
    )
    long_texts: Literal["cut", "windows"] = fixed(
        "cut",
        "What becomes of texts that are longer than max_len. cut: the end is left out. windows: a text is several "
        "rows that overlap (see stride); it counts once in training, and its prediction is the mean of their logits.",
        tasks=("classification",),
    )
    streaming: bool = fixed(
        False,
        "Read the corpus window by window, for a corpus larger than the disk. Needs max_steps.",
        tasks=("causal", "mlm", *CORRUPTION_TASKS),
    )
    streaming_window: int = fixed(
        100_000_000, "Tokens per window; rows are shuffled within a window.", ge=1, le=1 << 40, needs="streaming"
    )
    packing: Literal["stream", "documents", "pad", "best_fit"] | None = fixed(
        None,
        "How documents fill rows. stream: concatenated and cut at row ends. documents: the same, but tokens attend "
        "only within their document and positions restart. pad: one document per row, padded to the longest of the "
        "batch. best_fit: as many whole documents as fit a row, isolated from each other. Default: stream; best_fit "
        "for instruction.",
        tasks=("causal", "mlm", "instruction"),
    )
    mlm_probability: float | None = fixed(
        None,
        "Fraction of a row's tokens that are masked. Default: 0.15; 0.3 for denoising.",
        gt=0,
        lt=1,
        tasks=(*MLM_TASKS, *CORRUPTION_TASKS),
    )
    mean_span_length: float = fixed(
        3.0, "Mean length of the masked spans, in tokens.", ge=1, le=1000, tasks=CORRUPTION_TASKS
    )
    whole_word_masking: bool = fixed(False, "Mask all tokens of a word or none.", tasks=MLM_TASKS)

    @model_validator(mode="after")
    def _check_sources(self):
        for index, source in enumerate(self.datasets or []):
            if bool(source.get("train_file")) == bool(source.get("dataset")):
                raise RecipeError(f"datasets[{index}]: needs exactly one of train_file and dataset; remove or add one")
        if self.datasets:
            self._check_names()
            self._check_weights()
        return self

    def _check_names(self):
        names = [source.get("name") for source in self.datasets]
        for index, (source, name) in enumerate(zip(self.datasets, names, strict=True)):
            where = f"datasets[{index}]"
            if name is None and (any(names) or source.get("val_file") or self.mixture_schedule):
                raise RecipeError(f"{where}: it needs a name, for its validation set and mixture_schedule; give name")
            if name is not None:
                check_set_name(f"{where}.name", name)
                if names.index(name) < index:
                    raise RecipeError(f"{where}.name: {name!r} is the name of another source too; rename it")

    def _check_weights(self):
        names, last = [source.get("name") for source in self.datasets], 0
        for index, stage in enumerate(self.mixture_schedule or ()):
            where = f"mixture_schedule[{index}]"
            if unknown := [name for name in stage["weights"] if name not in names]:
                raise RecipeError(f"{where}: no source of datasets has the name {unknown[0]!r:.40}; correct it")
            if stage["step"] <= last:
                raise RecipeError(f"{where}: step {stage['step']} does not come after step {last}; order the stages")
            last = stage["step"]
        stages = self.weight_stages()
        for step, weights in stages:
            where = f"mixture_schedule at step {step}" if step else "datasets"
            if not any(weights):
                raise RecipeError(f"{where}: all weights are 0; raise that of a source that is read")
            least = min(filter(None, weights))
            if least / sum(weights) < 1e-6:
                raise RecipeError(
                    f"{where}: the weight {least} is less than a millionth of the sum; remove that source"
                )
        for index, weights in enumerate(zip(*(weights for _, weights in stages), strict=True)):
            if not any(weights):
                raise RecipeError(f"datasets[{index}]: its weight is 0 in every stage; remove that source")

    def weight_stages(self):
        """Return (first step, weight of each of `datasets`) of each stage of a mixture."""
        weights = [source.get("weight", 1.0) for source in self.datasets]
        stages, names = [(0, weights)], [source.get("name") for source in self.datasets]
        for stage in self.mixture_schedule or ():
            weights = [stage["weights"].get(name, old) for name, old in zip(names, weights, strict=True)]
            stages.append((stage["step"], weights))
        return stages

    def mixture_identity(self):
        """Return what defines the mixture of `datasets`, beside `mixture_schedule`; see [`Recipe.identity`]."""
        limits = [source.get("max_epochs") for source in self.datasets or ()]
        weights = {"weights": [source.get("weight", 1.0) for source in self.datasets]} if self.datasets else {}
        return weights | ({"max_epochs": limits} if any(limits) else {})

    @model_validator(mode="after")
    def _check_val_file(self):
        if self.val_file == {}:
            raise RecipeError("val_file: it names no validation set; name one, as {code: a.txt}, or leave val_file out")
        for name in self.val_file if isinstance(self.val_file, dict) else ():
            check_set_name("val_file", name)
        return self

    @model_validator(mode="after")
    def _check_tokenizer(self):
        if not isinstance(self.tokenizer, dict):
            return self
        algorithm, size = self.tokenizer["train"], self.tokenizer.get("vocab_size")
        if algorithm == "characters" and size is None:
            return self
        if size is None:
            raise RecipeError(
                f"tokenizer: {algorithm} needs a vocab_size; give {{train: {algorithm}, vocab_size: 8192}}"
            )
        # a byte-level tokenizer has 256 bytes and an end-of-text token
        smallest = 100 if algorithm == "wordpiece" else 257
        if not smallest <= size <= MANY:
            raise RecipeError(f"tokenizer: {algorithm}'s vocab_size must be at least {smallest}, and at most {MANY}; "
                              f"it is {size}")  # fmt: skip
        return self


def check_set_name(key, name):
    """Raise RecipeError if a validation set's metrics, as val_NAME_loss, could be taken for others."""
    if name == "ema" or str(name).startswith("ema_"):
        raise RecipeError(f"{key}: {name!r:.40} begins as the metrics of an average of the weights do; rename the set")
    if not re.fullmatch("[a-z][a-z0-9_]*", str(name)) or name == "training":
        raise RecipeError(
            f"{key}: {name!r:.40} cannot name a validation set; use lower-case letters, digits and _, for the key "
            "val_NAME_loss"
        )
