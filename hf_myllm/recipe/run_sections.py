"""The sections of a recipe about the run itself: its folder, LoRA, the Hub. See sections.py for the others."""

import re
from typing import Literal

from pydantic import model_validator

from ..errors import RecipeError
from .fields import MANY, PathText, Section, Texts, changeable, fixed, one_or_many

Trackers = one_or_many(
    Literal["tensorboard", "wandb", "trackio"], {"type": "string", "enum": ["tensorboard", "wandb", "trackio"]}
)


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
