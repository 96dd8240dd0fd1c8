"""Profile training steps with torch's profiler: `--profile N` records N steps.

Writes RUN/profile/trace.json for a trace viewer (ui.perfetto.dev, chrome://tracing), and RUN/profile/summary.txt with
the time by category: of GPU kernels or, without a GPU, of CPU operations. The category follows from the name of the
operation, so the products inside Muon count as matrix products.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from torch.profiler import ProfilerActivity, profile, schedule

from ..files import refuse_link

WARMUP_STEPS = 10  # not recorded: they compile and fill caches
_CATEGORIES = {  # the first whose pattern matches
    "communication": r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter",
    "attention": r"attention|flash|fmha|sdpa|flex_|cudnn.*sdp",
    "optimizer": r"adam|muon|foreach|multi_tensor|lpnorm|linalg_vector_norm",
    "matrix products": r"gemm|matmul|addmm|\bmm\b|::mm|bmm|cutlass|cublas|nvjet|xmma|linear|conv1d",
    "norms": r"layer_norm|rms|native_norm|rsqrt",
    "loss": r"softmax|nll_loss|cross_entropy|logsumexp",
    "embeddings": r"embedding|index_put|index_select|gather|scatter",
    # A compiled kernel is named after all its operations, and a conversion of the dtype is part of most.
    "copies": r"memcpy|memset|copy_kernel|batchedcopy|::(copy_|_to_copy|contiguous|cat|clone)$"
    r"|^triton_[a-z]+_fused(_+(to_copy|copy|clone|cat|view|t|transpose|permute|slice|select|split|stack|expand))+_\d+$",
    "element-wise": r"triton|elementwise|gelu|tanh|silu|add|mul|div|sub|fill|zero|pow|sum|where|dropout|neg|exp",
}


class Profiler:
    """Records `steps` steps of a run (None: none) on rank 0, after a warmup, which is shorter in a short run."""

    def __init__(self, run_dir, steps, total_steps):
        self.profile = None
        if not steps or total_steps < 1 or not PartialState().is_main_process:
            return
        self.run_dir, self.steps, self.summary = Path(run_dir), min(steps, total_steps), None
        has_gpu = torch.cuda.is_available()
        self.device = "device" if has_gpu else "cpu"
        warmup = max(0, min(WARMUP_STEPS, total_steps - self.steps))
        plan = schedule(wait=max(0, warmup - 1), warmup=min(1, warmup), active=self.steps, repeat=1)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * has_gpu
        self.profile = profile(activities=activities, schedule=plan, on_trace_ready=self._export)
        self.profile.start()

    def step(self, reporter):
        """Count a training step; print the summary once all steps are recorded."""
        if self.profile is None:
            return
        if self.device == "device":
            torch.cuda.synchronize()  # record whole steps
        self.profile.step()
        if self.summary is not None:
            for line in self.summary.splitlines():
                reporter.info(line)
            self.close()

    def close(self):
        if self.profile is not None:
            self.profile.stop()
        self.profile = None

    def _export(self, recorded):
        if self.summary is not None:
            return
        folder = self.run_dir / "profile"
        folder.mkdir(exist_ok=True)
        for name in ("trace.json", "summary.txt"):
            refuse_link(folder / name)
        recorded.export_chrome_trace(str(folder / "trace.json"))
        self.summary = summarize(recorded.key_averages(), self.steps, self.device)
        (folder / "summary.txt").write_text(self.summary + "\n")


def category_of(name):
    """Return the category of a kernel or operation by its name."""
    matches = (category for category, pattern in _CATEGORIES.items() if re.search(pattern, name, re.IGNORECASE))
    return next(matches, "other")


def summarize(events, steps, device):
    """Return a table of milliseconds per step by category, each with its three longest operations.

    Args:
        events: of torch's profiler, with a name (`key`) and the time spent in them alone, in microseconds.
        device: "device" or "cpu": whose time to count.
    """
    totals, operations = Counter(), {}
    for event in events:
        milliseconds = getattr(event, f"self_{device}_time_total") / 1000 / steps
        if milliseconds > 0 and not event.key.startswith("ProfilerStep"):
            category = category_of(event.key)
            totals[category] += milliseconds
            operations.setdefault(category, Counter())[event.key] += milliseconds
    total, measured = sum(totals.values()), "GPU kernels" if device == "device" else "CPU operations"
    lines = [f"profile     {measured}, ms per step over {steps} steps, {total:.2f} in total"]
    for category, milliseconds in totals.most_common():
        longest = ", ".join(f"{name[:40]} {part:.2f}" for name, part in operations[category].most_common(3))
        lines.append(f"  {category:<16}{milliseconds:9.2f} {milliseconds / total:6.1%}  {longest}")
    return "\n".join(lines)
