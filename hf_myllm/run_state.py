"""What changes while a run trains: the step, skipped steps, the best evaluation, requests to stop.

Everything else is a function of (recipe, step). `RunState` answers what is due after each step.
"""

import math

from .distributed import any_rank
from .errors import InputError
from .reporting.metrics_log import best_evaluation
from .terminal import first_of

MAX_SCALE_STEPS = 24  # in a row that halve the loss scale of fp16, from 65,536 to 1/256


class RunState:
    """The progress of a [`~hf_myllm.build.Run`].

    Attributes:
        step: optimizer steps done.
        last_step: the step at which training ends: `run.total_steps`, or earlier with early stopping.
        best_since: the first step whose evaluation is considered for the best.
        skipped_steps: consecutive steps that were left out because their loss or gradient was not finite.
        stop_requested: whether a rank received a signal.
        val_metrics: metrics of the last evaluation of all validation rows, if it was at `step`; else None.
    """

    def __init__(self, run):
        self.run, self.step = run, run.start_step
        self.skipped_steps = run.resume_state["skipped"] if run.resume_state else 0
        self.best_since = self._find_best_since()
        self.stop_requested, self.is_best, self.val_metrics = False, False, None
        out_of_patience = run.resume_from is not None and self._is_out_of_patience()
        self.last_step = self.step if out_of_patience else run.total_steps

    # ---- what is due

    @property
    def evaluation_due(self):
        every = self.run.recipe.evaluation.eval_freq
        return bool(every) and self.step % every == 0 and self.step < self.run.total_steps and not self.stop_requested

    @property
    def save_due(self):
        section = self.run.recipe.run
        is_regular = any(every and self.step % every == 0 for every in (section.save_freq, section.keep_every))
        return self.must_stop or self.is_best or is_regular

    @property
    def must_stop(self):
        return self.stop_requested or self.step >= self.last_step

    @property
    def was_interrupted(self):
        """Whether a signal stopped the run before its last step or its last evaluation."""
        return self.stop_requested and (self.step < self.last_step or self.val_metrics is None)

    def first_evaluation_due(self):
        """Return whether to evaluate before the first step: at the beginning, or where a signal interrupted it."""
        every, run = self.run.recipe.evaluation.eval_freq, self.run
        if not every or self.step % every or self.step >= run.total_steps:
            return False
        is_missing = run.accelerator.is_main_process and not run.reporter.has_evaluation(self.step)
        return any_rank(run.accelerator, is_missing)

    @property
    def needs_all_results(self):
        """Whether the results of all queued steps must be read now: before an evaluation, a save or a stop."""
        return self.evaluation_due or self.save_due

    # ---- what happened

    def advance(self):
        """Count a step. A single process reads its signals here; several ranks agree on them in the step itself."""
        self.step += 1
        self.is_best, self.val_metrics = False, None
        if self.run.accelerator.num_processes == 1 and self.run.signals:
            self.stop_requested = True

    def record_step(self, step, loss, grad_norm, stop_requested):
        """Note the result of a step: a request to stop, and whether the step was skipped because it was not finite.

        Raises:
            InputError: more consecutive steps were skipped than `max_skipped_steps`.
        """
        self.stop_requested |= stop_requested
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self.skipped_steps = 0 if is_finite else self.skipped_steps + 1
        limit = self.run.recipe.training.max_skipped_steps
        # With fp16, an infinite gradient first of all makes the scaler lower its scale. All ranks see the same values.
        lowers_scale = self.run.accelerator.scaler is not None and math.isfinite(loss)
        if is_finite or (lowers_scale and self.skipped_steps <= max(limit, MAX_SCALE_STEPS)):
            return
        rows = self.run.sampler.rows_of_step(step - 1).tolist()
        where = f"rows {first_of(rows, 8)} of {self.run.train_rows.name}"
        problem = f"step {step}: loss {loss}, gradient norm {grad_norm} ({where})"
        if lowers_scale or self.skipped_steps > limit:
            consecutive = f", {self.skipped_steps} skipped steps in a row" if self.skipped_steps > 1 else ""
            raise InputError(
                f"{problem}{consecutive}; lower learning_rate, raise warmup_steps or set grad_clip and resume with "
                "--allow_changed, or skip such steps with max_skipped_steps"
            )
        self.run.reporter.warning(f"skipped {problem}")

    def record_evaluation(self, metrics):
        """Note whether an evaluation is the best so far, and whether patience has run out.

        Args:
            metrics: of the validation rows ({} without any), or None if a signal interrupted the evaluation.
        """
        if metrics is None:
            self.stop_requested = True
            return
        is_main = self.run.accelerator.is_main_process
        self.is_best = any_rank(self.run.accelerator, is_main and self.best_step() == self.step)
        if self._is_out_of_patience():
            self.last_step, self.val_metrics = self.step, metrics  # metric_for_best evaluates all validation rows

    def record_final(self, metrics):
        """Note the metrics of all validation rows after the last step, or None if a signal interrupted them."""
        self.val_metrics, self.stop_requested = metrics, self.stop_requested or metrics is None

    # ---- the best evaluation, as metrics.jsonl has it

    def best(self):
        """Return (step, value, evaluations since) of the best evaluation so far; (None, None, n) without any."""
        section = self.run.recipe.evaluation
        if not section.metric_for_best:
            return None, None, 0
        options = section.metric_for_best, self.step, section.greater_is_better, self.best_since
        return best_evaluation(self.run.run_dir, *options)

    def _find_best_since(self):
        """Return the first step whose evaluation counts: metrics of other validation data cannot be compared."""
        state = self.run.resume_state
        if self.run.is_new:  # a branch has no checkpoint of the steps before
            return self.step + 1
        now = self.run.data_fingerprints()
        names = [name for name in {**now, **state["data"]} if name.startswith("validation data")]
        is_same = all(state["data"].get(name) == now.get(name) for name in names)
        return state.get("best_since", 1) if is_same else self.step + 1

    def best_step(self):
        return self.best()[0]

    def _is_out_of_patience(self):
        """Return on all ranks whether `patience` evaluations in a row brought no improvement. A collective."""
        patience, is_out = self.run.recipe.evaluation.patience, False
        if patience is None:
            return False
        if self.run.accelerator.is_main_process:
            step, _, evaluations_since = self.best()
            is_out = evaluations_since >= patience + (step is None)
        return any_rank(self.run.accelerator, is_out)
