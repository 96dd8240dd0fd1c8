"""The sections of a recipe: every key with its type, default, limits and help. run_sections.py has the last three."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..errors import RecipeError
from .fields import MANY, PathText, Section, Source, Texts, TrainedTokenizer, changeable, fixed, one_or_many
from .run_sections import Hub, Lora, Run

Paths = one_or_many(PathText, {"type": "string"})
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
        "dataset_config, dataset_split, dataset_revision, text_column and document. Weights are shares of the rows.",
        tasks=TEXT_TASKS,
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
        tasks=(*TEXT_TASKS, "instruction", "seq2seq"),
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
        "A Hub id, a folder, or {train: bpe, vocab_size: 8192} to train one on the training text (bpe or unigram; "
        "wordpiece for BERT; characters, without a vocab_size for all that occur). Default: the tokenizer of the model "
        "in init_from.",
    )
    add_tokens: Texts | None = fixed(
        None, "Tokens to add to the tokenizer; the model of init_from gets an embedding for each."
    )
    max_len: int | None = fixed(None, "Tokens per row. Default: the model's number of positions.", ge=1, le=MANY)
    stride: int | None = fixed(
        None,
        "Tokens from the start of one training row to the start of the next. Default: a row's length. For "
        "question_answering: tokens between the rows of a long context; default: half of what fits.",
        ge=1,
        le=MANY,
        tasks=("causal", "mlm", "question_answering"),
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
        weights = [source.get("weight", 1.0) for source in self.datasets or []]
        if weights and min(weights) / sum(weights) < 1e-6:
            raise RecipeError(
                f"datasets: the weight {min(weights)} is less than a millionth of the sum; remove that source"
            )
        return self

    @model_validator(mode="after")
    def _check_val_file(self):
        if self.val_file == {}:
            raise RecipeError("val_file: it names no validation set; name one, as {code: a.txt}, or leave val_file out")
        for name in self.val_file if isinstance(self.val_file, dict) else ():
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == "training":
                raise RecipeError(
                    f"val_file: {name!r:.40} cannot name a validation set; use lower-case letters, digits and _, for "
                    "the key val_NAME_loss"
                )
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


class Training(Section):
    epochs: float | None = fixed(None, "Passes over the training rows. Default: 1.", gt=0, le=MANY)
    max_steps: int | None = fixed(None, "Optimizer steps, instead of epochs.", ge=1, le=1 << 40)
    batch_size: int = changeable(8, "Rows per micro-batch on each rank.", ge=1, le=MANY)
    total_batch_size: int | None = fixed(None, "Rows per optimizer step over all ranks.", ge=1, le=MANY)
    gradient_accumulation_steps: int | None = changeable(
        None, "Micro-batches per optimizer step, instead of total_batch_size.", ge=1, le=1 << 16
    )
    optimizer: Literal["adamw", "muon"] = fixed(
        "adamw", "adamw, or muon: Muon for the weight matrices of the layers and AdamW for all other parameters."
    )
    learning_rate: float = fixed(3e-4, "Peak learning rate.", gt=0)
    min_lr: float = fixed(0.0, "Learning rate at the end of the schedule; constant ignores it.", ge=0)
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = fixed(
        "cosine", "Shape of the learning rate after the warmup; wsd is warmup, stable, decay."
    )
    warmup_steps: int = fixed(0, "Steps of linear warmup to the peak learning rate.", ge=0)
    decay_steps: int | None = fixed(None, "Steps of wsd's final decay. Default: a fifth of all steps.", ge=1)
    weight_decay: float = fixed(0.1, "Weight decay, applied to matrices only.", ge=0)
    beta1: float = fixed(0.9, "AdamW's first-moment decay.", ge=0, lt=1)
    beta2: float = fixed(0.95, "AdamW's second-moment decay.", ge=0, lt=1)
    epsilon: float = fixed(1e-8, "AdamW's epsilon.", gt=0)
    label_smoothing: float = fixed(
        0.0,
        "Label smoothing of the training loss; that of evaluations is plain.",
        ge=0,
        lt=1,
        tasks=("seq2seq", *CLASS_TASKS),
    )
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(ge=0)]] | None = fixed(
        None,
        "Weights of the classes in the training loss, as {spam: 4}; others have 1. balanced: all classes count alike. "
        "They are scaled so that their mean over the training labels is 1. The loss of evaluations is plain.",
        tasks=CLASS_TASKS,
    )
    grad_clip: float = fixed(1.0, "Maximum norm of the gradient; 0 disables clipping.", ge=0)
    max_skipped_steps: int = fixed(
        0, "Consecutive steps that may be skipped because of a non-finite loss or gradient; 0 stops at the first.", ge=0
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = changeable(
        "auto",
        "What the model computes in; weights and optimizer state keep their dtype. auto: bf16 on a GPU that has it, "
        "else fp32. fp32: on a GPU, matrix products in TF32. fp16: for GPUs before Ampere. fp8: matrix products of the "
        "layers in fp8, the rest in bf16; needs torchao. A setting of the launcher replaces auto.",
    )
    dtype: Literal["float32", "bfloat16"] = fixed(
        "float32",
        "Data type of the weights, whatever init_from's file holds. bfloat16 halves the memory and loses small "
        "updates; mixed precision is called precision.",
    )
    gradient_checkpointing: bool = changeable(
        False,
        "Recompute each layer in the backward pass instead of storing its activations: less memory, a third more "
        "compute.",
    )
    implementation: Literal["ours", "stock"] = fixed(
        "ours", "Train our class of the model, where there is one, or the stock class of transformers."
    )
    compile: bool = changeable(False, "Compile the model with torch.compile.")
    deterministic: bool = changeable(
        False,
        "On a GPU, use deterministic algorithms only, so that two runs end with the same bytes; slower. On a CPU, all "
        "runs do.",
    )

    @model_validator(mode="after")
    def _check_precision(self):
        if self.dtype == "bfloat16" and self.precision in ("fp32", "fp16"):
            raise RecipeError(
                f"precision: {self.precision} needs weights in float32, and dtype is bfloat16; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_learning_rate(self):
        if self.decay_steps and self.lr_schedule != "wsd":
            raise RecipeError(f"decay_steps has no effect with lr_schedule {self.lr_schedule}; remove it, or use wsd")
        if self.min_lr > self.learning_rate:
            raise RecipeError(
                f"min_lr ({self.min_lr}) must not be above learning_rate ({self.learning_rate}); lower it"
            )
        if self.max_steps and self.warmup_steps > self.max_steps:
            raise RecipeError(
                f"warmup_steps ({self.warmup_steps}) must not be above max_steps ({self.max_steps}); lower it"
            )
        return self


class Evaluation(Section):
    eval_freq: int | None = changeable(None, "Steps between evaluations. Default: one at the end.", ge=1)
    eval_iter: int | None = changeable(
        None,
        "Batches of total_batch_size rows per evaluation of the training and validation loss. Default: 20. The "
        "evaluation at the end reads all validation rows. For seq2seq it is also the number of generated targets.",
        ge=1,
        le=MANY,
    )
    start_context: str | None = changeable(
        None,
        'Prompt of the sample at each evaluation ("" starts from nothing), or text whose [MASK] is filled in. Default: '
        "no sample.",
        tasks=(*TEXT_TASKS, "instruction", "seq2seq"),
    )
    max_new_tokens: int = changeable(
        100, "Tokens of a sample.", ge=1, le=MANY, tasks=GENERATING_TASKS, needs="start_context"
    )
    temperature: float = changeable(
        0.8,
        "Temperature of a sample; 0 is greedy decoding.",
        ge=0,
        le=100,
        tasks=GENERATING_TASKS,
        needs="start_context",
    )
    top_k: int = changeable(
        50,
        "Sample from the k most likely tokens; 0 samples from all.",
        ge=0,
        tasks=GENERATING_TASKS,
        needs="start_context",
    )
    num_beams: int = changeable(
        1, "Beams of the generated targets; 1 is greedy decoding.", ge=1, le=256, tasks=("seq2seq",)
    )
    metrics: Paths | None = changeable(
        None, "Additional metrics of the `evaluate` library, by name or path.", tasks=LABELLED_TASKS
    )
    trust_metric_code: bool = changeable(
        False,
        "Run the code of metrics that are files or folders here, or belong to a user of the Hub.",
        tasks=LABELLED_TASKS,
        needs="metrics",
    )
    metric_for_best: str | None = changeable(
        None,
        "Validation metric that selects the best checkpoint, such as val_loss or val_f1. Every evaluation then reads "
        "all validation rows. Needs eval_freq.",
    )
    greater_is_better: bool | None = changeable(
        None,
        "Whether a greater metric_for_best is better. Default: false for losses, perplexities, bits and errors, else "
        "true.",
        needs="metric_for_best",
    )
    patience: int | None = changeable(
        None,
        "Early stopping: evaluations without a better metric_for_best before training stops.",
        ge=1,
        needs="metric_for_best",
    )
    final_model: Literal["best", "last"] | None = changeable(
        None,
        "Model in the run's folder at the end. Default: best if there is a metric_for_best, else last.",
        needs="metric_for_best",
    )
    eval_only: bool = changeable(False, "Evaluate on all validation rows, print the result and write nothing.")

    @model_validator(mode="after")
    def _check_best(self):
        if self.metric_for_best is None:
            if self.final_model == "best":
                raise RecipeError("final_model best needs a metric; give --metric_for_best NAME")
            self.final_model = "last"
            return self
        if self.eval_freq is None:
            raise RecipeError("metric_for_best needs several evaluations; give --eval_freq N")
        self.metric_for_best = f"val_{self.metric_for_best.removeprefix('val_')}"
        self.final_model = self.final_model or "best"
        return self


SECTIONS = {"data": Data, "training": Training, "evaluation": Evaluation, "lora": Lora, "run": Run, "hub": Hub}
FIELDS = {name: field for section in SECTIONS.values() for name, field in section.model_fields.items()}
SECTION_OF = {name: section for section, model in SECTIONS.items() for name in model.model_fields}
# Keys that an evaluation uses; other keys have no effect on it.
EVALUATION_KEYS = {
    *(set(Data.model_fields) - {"stride", "streaming", "streaming_window"}),
    *("batch_size", "compile", "dtype", "precision", "deterministic"),
    *("metrics", "trust_metric_code", "eval_only", "num_beams"),
    *("save_model", "init_from", "resume", "seed", "log_level"),
}
ALIASES = {
    "num_epochs": "epochs",
    "save_path": "save_model",
    "valid_file": "val_file",
    "load_model": "init_from",
}
# A recipe gives one key of each pair; a flag replaces the file's.
EXCLUSIVE = (
    ("train_file", "dataset"),
    ("template", "text_column"),
    ("train_file", "datasets"),
    ("dataset", "datasets"),
    ("total_batch_size", "gradient_accumulation_steps"),
    ("epochs", "max_steps"),
)
