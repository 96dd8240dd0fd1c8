"""Checkpoints that are written beside the training, by one process or by several ranks, which are killed meanwhile."""

import signal
import time

import pytest
from conftest import read_metrics, read_weights
from launching import GLOO, start, start_ranks
from patches import shard_on_a_disk_that_fills, shard_on_slow_disks, slow_disk

from hf_myllm import checkpoint

FSDP2 = "--config_file accelerate_configs/fsdp2.yaml --main_process_port 0 --mixed_precision no"
MOMENTS = (  # by what a rank or its disk has just done
    "checkpoint-*.partial",
    "checkpoint-*.partial/model*.safetensors",
    "checkpoint-*.partial/trainer_state/optimizer*.safetensors",
    "checkpoint-*.partial/config.json",
    "checkpoint-*.partial/tokenizer.json",
    "checkpoint-*.partial/trainer_state/state.json",
    "checkpoint-*.partial/trainer_state/complete.json",
    "checkpoint-*.old.partial",
)


def start_run(kind, *flags):
    if kind == "one process":
        return [start(*flags, patch=slow_disk)]
    options, patch = (FSDP2, shard_on_slow_disks) if kind == "FSDP2" else (GLOO, slow_disk)
    return start_ranks(2, *flags, options=options, patch=patch)


def kill_at(run, ranks, pattern, victims):
    """Kill ranks once a save has got as far as a pattern of files says; return whether it did before the run ended."""
    seen = set(run.glob(pattern))
    while all(rank.poll() is None for rank in ranks):
        if set(run.glob(pattern)) - seen:
            for victim in victims:
                ranks[victim].send_signal(signal.SIGKILL)
            return True
        time.sleep(0.001)
    return False


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["one process", "DDP", "FSDP2"])
def test_a_run_killed_at_each_moment_of_its_saves_ends_with_the_same_bytes(tiny, tmp_path, kind):
    flags, reference, run = (
        tiny(eval_freq=10, save_freq=3, epochs=None, max_steps=40),
        tmp_path / "reference",
        tmp_path / "run",
    )
    ranks = start_run(kind, *flags, "--save_model", reference)
    assert all(rank.wait(120) == 0 for rank in ranks), [rank.output() for rank in ranks]
    kills, resume = 0, [*flags, "--save_model", run, "--init_from", "resume"]
    victims = [[0]] if kind == "one process" else [[0], [1], [0, 1]]
    for index, pattern in enumerate(MOMENTS):
        ranks = start_run(kind, *resume)
        kills += kill_at(run, ranks, pattern, victims[index % len(victims)])
        for rank in ranks:
            rank.wait(60)  # a rank that was not killed must not wait for the other
        if newest := checkpoint.has_checkpoints(run) and checkpoint.find_latest(run):
            assert checkpoint.find_corruption(newest) is None
    assert kills >= 6
    ranks = start_run(kind, *resume)
    assert all(rank.wait(120) == 0 for rank in ranks), [rank.output() for rank in ranks]
    assert read_weights(run) == read_weights(reference)
    for key in ("loss", "rows", "val_loss"):
        assert read_metrics(run, key) == read_metrics(reference, key), key


@pytest.mark.chaos
def test_a_rank_whose_disk_is_full_fails_the_save_on_all_ranks(tiny, tmp_path):
    """At the last checkpoint, an error; before it, a warning."""
    for steps, code in ((8, 2), (12, 0)):
        run = tmp_path / str(steps)
        flags = tiny(max_steps=steps, epochs=None, save_freq=4, save_model=run)
        ranks = start_ranks(2, *flags, options=FSDP2, patch=shard_on_a_disk_that_fills)
        codes = [rank.wait(120) for rank in ranks]
        out, err = map("".join, zip(*(rank.output() for rank in ranks), strict=True))
        problem = f"{run}/checkpoint-8: it cannot be saved: rank 1: [Errno 28] No space left on device"
        assert bool(codes[0]) == bool(codes[1]) == bool(code), err
        if code:
            assert err.count(problem) == 1
            assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
        else:
            assert out.count(f"{problem}; checkpoint-4 stays") == 1
            assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4"]
