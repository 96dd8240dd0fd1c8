"""The sections of a recipe: every key with its type, default, limits and help. See also data_section.py."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..errors import RecipeError
from .data_section import CLASS_TASKS, GENERATING_TASKS, LABELLED_TASKS, TEXT_TASKS, Data
from .fields import MANY, PathText, Section, Texts, WeightAveraging, changeable, fixed, one_or_many

Paths = one_or_many(PathText, {"type": "string"})
Trackers = one_or_many(
    Literal["tensorboard", "wandb", "trackio"], {"type": "string", "enum": ["tensorboard", "wandb", "trackio"]}
)


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
    weight_averaging: WeightAveraging | None = fixed(
        None,
        "{ema: 0.999} also keeps an exponential moving average of the weights, in fp32, which changes nothing in the "
        "training. Evaluations measure it too (val_ema_loss), and final_model: ema publishes it.",
    )
    final_model: Literal["best", "last", "ema"] | None = changeable(
        None,
        "Model in the run's folder at the end: that of the best or the last evaluation, or the average of the weights. "
        "Default: best if there is a metric_for_best, else last. The best by a val_ema metric is the average then.",
    )
    eval_only: bool = changeable(False, "Evaluate on all validation rows, print the result and write nothing.")

    @model_validator(mode="after")
    def _check_best(self):
        if self.final_model == "ema" and self.weight_averaging is None:
            raise RecipeError("final_model ema needs an average of the weights; give --weight_averaging '{ema: 0.999}'")
        if self.metric_for_best is None:
            if self.final_model == "best":
                raise RecipeError("final_model best needs a metric; give --metric_for_best NAME")
            self.final_model = self.final_model or "last"
            return self
        if self.eval_freq is None:
            raise RecipeError("metric_for_best needs several evaluations; give --eval_freq N")
        self.metric_for_best = f"val_{self.metric_for_best.removeprefix('val_')}"
        self.final_model = self.final_model or "best"
        return self

    @property
    def publishes_average(self):
        """Whether the model in the run's folder is the average of the weights at the end."""
        is_best = self.final_model == "best" and self.metric_for_best.startswith("val_ema_")
        return self.weight_averaging is not None and (self.final_model == "ema" or is_best)


class Lora(Section):
    r: int | None = fixed(
        None, "Rank of the LoRA matrices; the model's own weights are frozen. Default: no LoRA.", ge=1, le=1 << 12
    )
    lora_alpha: int | None = fixed(None, "LoRA's scale is lora_alpha / r. Default: 2 * r.", ge=1, le=MANY, needs="r")
    lora_dropout: float = fixed(0.0, "Dropout in front of the LoRA matrices.", ge=0, lt=1, needs="r")
    target_modules: Texts | None = fixed(
        None, "Modules that get LoRA matrices, or all-linear. Default: peft's choice for the family.", needs="r"
    )
    merge_lora: bool = changeable(
        False, "Merge LoRA into the model at the end, so that the run's folder holds a full model.", needs="r"
    )


class Run(Section):
    save_model: PathText = changeable("out", "The run's folder.")
    init_from: PathText = changeable(
        "scratch",
        "scratch; resume: continue the run in save_model from its newest checkpoint, or start it if there is none; or "
        "a folder or Hub id of a model of this family to start from; id@revision is its branch, tag or commit.",
    )
    with_optimizer: bool = changeable(
        False,
        "Go on from init_from, a checkpoint of any run (RUN/checkpoint-500), in a new folder: with its weights, its "
        "optimizer state and its step. Data, schedule and batch size may be others.",
    )
    dry_run: bool = changeable(False, "Show what the run would do (sizes, counts, memory, a first batch) and exit.")
    resume: bool = changeable(False, "The same as --init_from resume.")
    allow_changed: bool = changeable(False, "Resume even if the recipe or the data changed.")
    save_freq: int | None = changeable(500, "Steps between checkpoints; null saves only at the end.", ge=1)
    save_total_limit: int | None = changeable(2, "Number of newest checkpoints to keep; null keeps all.", ge=1)
    keep_every: int | None = changeable(
        None, "Also save every N steps, and keep these checkpoints beside the newest: milestones.", ge=1
    )
    log_freq: int = changeable(1, "Steps between lines of metrics.jsonl.", ge=1)
    log_level: Literal["debug", "info", "warning", "error"] = changeable(
        "info",
        "Messages in the terminal. info: progress. warning: only warnings and errors. error: only errors. debug: also "
        "the libraries' messages.",
    )
    log_with: Trackers | None = changeable(None, "Trackers that receive the metrics; each needs its package.")
    project_name: str = changeable("hf_myllm", "Project in the trackers.", needs="log_with")
    profile: int | None = changeable(
        None,
        "Steps to record with torch.profiler, after the first ones: a trace and a summary of time by operation.",
        ge=1,
        le=1000,
    )
    seed: int = fixed(1337, "Seed of the initial weights, the order of rows and dropout.", ge=0, le=1 << 62)

    @model_validator(mode="after")
    def _check_branch(self):
        if self.with_optimizer and self.init_from == "scratch" and not self.resume:
            raise RecipeError("with_optimizer has no effect without a checkpoint; give --init_from RUN/checkpoint-500")
        return self

    @model_validator(mode="after")
    def _check_project(self):
        if ".." in re.split(r"[/\\]", self.project_name) or self.project_name.startswith(("/", "\\")):
            raise RecipeError(f"project_name: {self.project_name!r:.100} leads out of the run's folder; give a name")
        return self


class Hub(Section):
    push_to_hub: str | None = changeable(
        None,
        "Hugging Face Hub repository, as user/name. Each checkpoint's model is uploaded during training, the last with "
        "a model card.",
    )
    hub_private_repo: bool = changeable(False, "Create the repository as private.", needs="push_to_hub")
    hub_revision: str | None = changeable(None, "Branch of the repository. Default: main.", needs="push_to_hub")
    language: str | None = changeable(None, "Language of the text for the model card, as a Hub code: en, de.")
    license: str | None = changeable(None, "Licence of the model for the model card, as a Hub code: mit, apache-2.0.")


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
