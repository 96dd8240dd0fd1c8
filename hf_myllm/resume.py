"""What must be the same when a run resumes: its recipe, its tokenizer and its data."""

import torch

from .data import sampler
from .errors import CheckpointError, InputError
from .recipe.sections import FIELDS

LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules")


def check_resumable(run):
    """Raise CheckpointError if the data have changed since the checkpoint, or it is beyond the last step."""
    previous = run.resume_state["data"]
    changed = [name for name, value in run.data_fingerprints().items() if previous.get(name) != value]
    if changed and not (run.recipe.run.allow_changed or run.recipe.run.dry_run):  # a dry run may read a part only
        raise CheckpointError(
            f"{run.resume_from}: other tokens in the {' and the '.join(changed)} now; give the data of the run, or "
            "--allow_changed to continue with these"
        )
    if run.start_step > run.total_steps:
        raise CheckpointError(
            f"{run.resume_from} is beyond the {run.total_steps} steps of this recipe; raise max_steps or epochs"
        )


def check_same_recipe(recipe, trainer_state, resume_from):
    """Raise CheckpointError if the checkpoint is of another recipe: a resumed run would be neither of the two."""
    now = recipe.identity()
    defaults = {key: field.default for key, field in FIELDS.items() if key in now}  # of keys added later
    then = defaults | trainer_state["recipe"]
    keys = [key for key in now | then if then.get(key) != now.get(key)]
    changed = [f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in keys]
    if lora_changes := [change for key, change in zip(keys, changed, strict=True) if key in LORA_KEYS]:
        raise CheckpointError(f"{resume_from}: LoRA has other settings there: {'; '.join(lora_changes)}; give the same")
    if "tokenizer" in keys:
        raise CheckpointError(f"{resume_from}: trained with another tokenizer, {then['tokenizer']!r}; give that one")
    if changed and not recipe.run.allow_changed:
        raise CheckpointError(
            f"{resume_from} belongs to another recipe: {'; '.join(changed)}; give the same, or --allow_changed to "
            "continue with the new, or --save_model FOLDER for a new run"
        )


def check_same_data(run):
    """Raise InputError on all ranks if they did not prepare the same tokens. A collective."""
    digest = sampler.derive_seed(*sorted(run.data_fingerprints().items()), len(run.tokenizer or ()))
    digests = run.accelerator.gather(torch.tensor([digest], device=run.accelerator.device)).tolist()
    if len(set(digests)) > 1:
        raise InputError("train_file: the ranks do not have the same tokens; give all machines the same files")
