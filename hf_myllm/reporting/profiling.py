"""Where a step's time goes: `--profile N` records N steps, by torch's profiler.

RUN/profile/trace.json is for a viewer of traces (ui.perfetto.dev, chrome://tracing); RUN/profile/summary.txt, which
is printed too, has the time by kind: of the GPU's kernels or, without one, of the operations on the CPU. A kind is told
by an operation's name, so that Muon's products count as matrix products.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SETTLING = 10  # steps before, in which things are compiled and caches filled
_KINDS = {  # the first whose pattern a name fits
    "communication": r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter",
    "attention": r"attention|flash|fmha|sdpa|flex_|cudnn.*sdp",
    "optimizer": r"adam|muon|foreach|multi_tensor|lpnorm|linalg_vector_norm",
    "matrix products": r"gemm|matmul|addmm|\bmm\b|::mm|bmm|cutlass|cublas|nvjet|xmma|linear|conv1d",
    "copies": r"memcpy|memset|copy_|_to_copy|contiguous|\bcat\b|clone",
    "norms": r"layer_norm|rms|native_norm",
    "loss": r"softmax|nll_loss|cross_entropy",
    "embeddings": r"embedding|index_put|index_select|gather|scatter",
    "element-wise": r"triton|elementwise|gelu|tanh|silu|add|mul|div|sub|fill|zero|pow|sum|where|dropout|neg|exp",
}


class Profiler:
    """Records some steps of a run, once things have settled.

    Args:
        folder: the run's.
        steps: how many to record.
        total_steps: of the run; where it is short, it settles for less.
    """

    def __init__(self, folder, steps, total_steps):
        steps = min(steps, total_steps)
        self.folder, self.steps, self.summary = Path(folder) / "profile", steps, None
        on_gpu = torch.cuda.is_available()
        self.device = "device" if on_gpu else "cpu"
        settling = max(0, min(SETTLING, total_steps - steps))
        wait, warmup = max(0, settling - 1), min(1, settling)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        plan = schedule(wait=wait, warmup=warmup, active=steps, repeat=1)
        self.profile = profile(activities=activities, schedule=plan, on_trace_ready=self._keep)
        self.profile.start()

    def step(self):
        """A step is done. Returns the summary, once."""
        if self.profile is None:
            return None
        if self.device == "device":
            torch.cuda.synchronize()  # what is recorded is whole steps
        self.profile.step()
        if self.summary is None:
            return None
        self.close()
        return self.summary

    def close(self):
        if self.profile is not None:
            self.profile.stop()
        self.profile = None

    def _keep(self, found):
        if self.summary is not None:
            return
        self.folder.mkdir(exist_ok=True)
        found.export_chrome_trace(str(self.folder / "trace.json"))
        self.summary = summarize(found.key_averages(), self.steps, self.device)
        (self.folder / "summary.txt").write_text(self.summary + "\n")


def kind_of(name):
    """What a kernel or an operation is for, by its name."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def summarize(events, steps, device):
    """A table of milliseconds a step by kind, each with what takes most of it.

    Args:
        events: with a name (`key`) and the time that they took by themselves, in microseconds.
        device: "device" or "cpu": whose time counts.
    """
    kinds, parts = Counter(), {}
    for event in events:
        spent = getattr(event, f"self_{device}_time_total") / 1000 / steps
        if spent > 0 and not event.key.startswith("ProfilerStep"):
            kind = kind_of(event.key)
            kinds[kind] += spent
            parts.setdefault(kind, Counter())[event.key] += spent
    total, where = sum(kinds.values()), "kernels of the GPU" if device == "device" else "operations on the CPU"
    lines = [f"{where}, ms a step over {steps} steps, {total:.2f} in all"]
    for kind, spent in kinds.most_common():
        most = ", ".join(f"{name[:40]} {part:.2f}" for name, part in parts[kind].most_common(3))
        lines.append(f"  {kind:<16}{spent:9.2f} {spent / total:6.1%}  {most}")
    return "\n".join(lines)
