"""What must be the same when a run resumes or branches: its recipe, its tokenizer and its data."""

from pathlib import Path

from . import checkpoint
from .data import sampler
from .data import tokenizer as tokenizers
from .distributed import gather
from .ema import WeightAverage
from .errors import CheckpointError, InputError
from .recipe.sections import FIELDS
from .reporting.facts import public_value

LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules")


def is_branch(recipe, resume_from):
    """Return whether a run goes on from a checkpoint of another folder."""
    return resume_from is not None and resume_from.parent != Path(recipe.run.save_model)


def find_branch_point(run):
    """Return the facts about the checkpoint that a run branched from, now or in an earlier launch; None if it did not.

    They are the folder's name, the step, the checkpoint's digest, what is different in this run, and the facts about
    where that run branched from.
    """
    state = run.resume_state or {}
    if not is_branch(run.recipe, run.resume_from):
        return state.get("branched_from")
    now, then = _identities(run.recipe, state)
    pairs = {key: (public_value(then.get(key), key), public_value(now.get(key), key)) for key in _changes(now, then)}
    changed = [f"{key} was {was!r} and is {value!r}" for key, (was, value) in pairs.items()]
    changed += [f"other tokens in the {name}" for name in _changed_data(run)]
    facts = {"run": run.resume_from.resolve().parent.name, "step": state["step"]}
    facts |= {"digest": checkpoint.digest(run.resume_from), "changed": changed}
    return facts | {"branched_from": state["branched_from"]} if "branched_from" in state else facts


def _changed_data(run):
    """Return the names of the data that are not those of the checkpoint."""
    previous = run.resume_state["data"]
    for name, rows in run.data_parts().items():  # fingerprints of more than 32 digits are from before token shards
        tokens, known = rows.tokens, previous.get(name, "")
        if known != tokens.fingerprint and known[32:33].isalnum() and known == tokens.old_fingerprint():
            tokens.fingerprint = known
    return [name for name, value in run.data_fingerprints().items() if previous.get(name) != value]


def check_resumable(run):
    """Raise CheckpointError if the data have changed since the checkpoint, or it is beyond the last step."""
    changed, branches = _changed_data(run), is_branch(run.recipe, run.resume_from)
    may_change = run.recipe.run.allow_changed or run.recipe.run.dry_run or branches  # a dry run may read a part only
    if changed and not may_change:
        raise CheckpointError(
            f"{run.resume_from}: other tokens in the {' and the '.join(changed)} now; give the data of the run, or "
            "--allow_changed to continue with these"
        )
    if run.start_step + branches > run.total_steps:  # a branch that ends where it begins would have no checkpoint
        raise CheckpointError(
            f"{run.resume_from} is {'at the end of' if run.start_step == run.total_steps else 'beyond'} the "
            f"{run.total_steps} steps of this recipe; raise max_steps or epochs"
        )


def check_same_recipe(recipe, trainer_state, resume_from, tokenizer):
    """Raise CheckpointError if the checkpoint is of another recipe: a resumed run would be neither of the two.

    A run that branches may have another recipe, as long as the weights and the optimizer's state mean the same. A
    tokenizer that is left open, or that is the same by its content, becomes that of the checkpoint's recipe.

    Args:
        tokenizer: that of the checkpoint; None for token ids without one.
    """
    name = trainer_state["recipe"].get("tokenizer")
    if recipe.data.tokenizer != name and _is_same_tokenizer(recipe, tokenizer):
        recipe.data.tokenizer = name
    branches, (now, then) = is_branch(recipe, resume_from), _identities(recipe, trainer_state)
    keys = _changes(now, then)
    changed = [f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in keys]
    kept = {"optimizer": branches, "implementation": True}
    kept["streaming_window"] = not branches and now["streaming"] and then["streaming"]  # positions are of its windows
    if lora_changes := [change for key, change in zip(keys, changed, strict=True) if key in LORA_KEYS]:
        raise CheckpointError(f"{resume_from}: LoRA has other settings there: {'; '.join(lora_changes)}; give the same")
    if "tokenizer" in keys:
        given = f", {then['tokenizer']!r}" if then["tokenizer"] else ""
        raise CheckpointError(f"{resume_from}: trained with another tokenizer{given}; leave tokenizer out to keep it")
    for key, change in zip(keys, changed, strict=True):
        if kept.get(key):
            raise CheckpointError(f"{resume_from}: {change}; give {key} {then[key]}, or start without its state")
    if changed and not (recipe.run.allow_changed or branches):
        raise CheckpointError(
            f"{resume_from} belongs to another recipe: {'; '.join(changed)}; give the same, or --allow_changed to "
            "continue with the new, or --save_model FOLDER for a new run"
        )


def _is_same_tokenizer(recipe, own):
    """Return whether a recipe leaves the tokenizer open, or names a stored one that splits text as `own` does."""
    if not isinstance(recipe.data.tokenizer, str) or own is None:
        return recipe.data.tokenizer is None
    given = tokenizers.load(recipe.data.tokenizer)
    given.add_tokens(recipe.data.add_tokens or [])
    return tokenizers.fingerprint(given) == tokenizers.fingerprint(own)


def _identities(recipe, trainer_state):
    """Return the keys that define a run, and those of the run that wrote a checkpoint."""
    now = recipe.identity()
    defaults = {key: field.default for key, field in FIELDS.items() if key in now}  # of keys added later
    return now, defaults | trainer_state["recipe"]


def _changes(now, then):
    return [key for key in now | then if then.get(key) != now.get(key)]


def start_average(run):
    """Set `run.weight_average` if the recipe asks for it: that of the checkpoint, or the weights as they are now."""
    averaging = run.recipe.evaluation.weight_averaging
    if averaging is None:
        return
    run.weight_average = WeightAverage(run.model, averaging["ema"])
    if run.resume_from is not None and not run.weight_average.load(checkpoint.OptimizerFiles(run.resume_from)):
        run.resume_warnings.append(f"the average of the weights starts with those of step {run.start_step}")


def check_same_data(run):
    """Raise InputError on all ranks if they did not prepare the same tokens.

    A collective, before which the ranks wait for each other: the data of one machine may take hours longer.
    """
    digest = sampler.derive_seed(*sorted(run.data_fingerprints().items()), len(run.tokenizer or ()))
    if len(set(gather(run.accelerator, digest))) > 1:
        raise InputError("train_file: the ranks do not have the same tokens; give all machines the same files")
