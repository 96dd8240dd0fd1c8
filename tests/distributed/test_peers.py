"""Waiting for other ranks and noticing their death through a store, without a collective."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics
from launching import has_reached, start_ranks, wait_for
from patches import block_in_collectives, sleep_while_building

from hf_myllm import peers as peers_module
from hf_myllm.distributed import StopQuestion
from hf_myllm.errors import PeerFailure, RankError
from hf_myllm.peers import MAX_MISSED, Peers


@pytest.fixture
def ranks(monkeypatch):
    """Make the three ranks of a run, whose threads do not run: a test beats for them."""
    monkeypatch.setattr(peers_module, "_numbers", iter([0, 0, 0]))
    store = torch.distributed.HashStore()
    return [Peers(SimpleNamespace(clone=lambda: store), rank, 3, lambda: "step 7") for rank in range(3)]


def beat(ranks, rounds=1):
    for _ in range(rounds):
        for rank in ranks:
            rank.beat()


def test_a_rank_that_falls_silent_is_named_once(ranks, monkeypatch):
    monkeypatch.setattr(Peers, "_has_exited", lambda self, rank: False)
    beat(ranks, 3)
    beat(ranks[:2], MAX_MISSED)
    assert all(rank.problem is None for rank in ranks)
    beat(ranks[:2])  # rank 1 watches rank 2
    beat(ranks[:2])
    error = ranks[1].error()
    assert type(error) is RankError
    host = peers_module._this_process()[0]
    assert str(error).startswith(f"rank 1 of 3, in step 7: rank 2 on {host} has not answered for 45 s")
    assert "--init_from resume" in str(error)
    assert type(ranks[0].error()) is PeerFailure  # which prints nothing
    assert type(ranks[1].error()) is RankError  # an error that follows the first does not silence it
    assert ranks[1].is_first_failure()
    assert not ranks[0].is_first_failure()


def test_pauses_are_no_death(ranks, monkeypatch):
    monkeypatch.setattr(Peers, "_has_exited", lambda self, rank: False)
    for _ in range(3):
        beat(ranks[:2], MAX_MISSED - 1)  # rank 2 holds Python's lock, or is stopped
        beat(ranks)
    with monkeypatch.context() as patch:  # all were suspended for a week
        patch.setattr(time, "monotonic", lambda: 1e9)
        patch.setattr(time, "time", lambda: 2e9)
        beat(ranks, 2)
    ranks[2].stop()  # ended, as it should
    beat(ranks[:2], 2 * MAX_MISSED)
    assert all(rank.problem is None for rank in ranks)


def test_a_rank_that_failed_ends_the_others_and_is_the_only_one_to_print(ranks):
    assert ranks[0].is_first_failure()
    assert not ranks[1].is_first_failure()
    beat(ranks)
    assert ranks[0].problem is None  # its own error is its message
    assert type(ranks[2].error()) is PeerFailure
    with pytest.raises(PeerFailure):
        ranks[2].wait()


def test_a_killed_process_of_this_machine_is_noticed_at_the_next_beat(ranks):
    process = subprocess.Popen([sys.executable, "-c", ""])
    ranks[0].store.set("process/2", " ".join(map(str, (*peers_module._this_process()[:2], process.pid))))
    while not ranks[0]._has_exited(2):  # it is not waited for: a zombie
        time.sleep(0.01)
    ranks[2].stopped.set()
    beat(ranks[:2], 2)
    assert "rank 2 on" in ranks[1].problem
    assert "was killed" in ranks[0].find_dead()
    process.wait()


def test_ranks_wait_for_each_other_and_leave_together(ranks):
    order = []

    def run(rank):
        for round_number in range(3):
            if rank.rank == round_number:
                time.sleep(0.05)
                order.append(round_number)
            rank.wait()
            order.append("after")
        rank.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [order[index] for index in (0, 4, 8)] == [0, 1, 2]
    assert len(order) == 12


def test_an_evaluation_asks_for_signals_about_every_two_seconds():
    """Counted: the collectives, whatever a batch takes."""
    for seconds, expected in ((5.0, 99), (0.5, 25), (0.001, 2)):
        collectives, now = [], [0.0]

        def reduce(tensor, collectives=collectives):
            collectives.append(tensor.tolist())
            return 2 * tensor  # of two ranks that are equally fast

        accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=reduce)
        question = StopQuestion(accelerator, [], lambda now=now: now[0])
        for _ in range(100):
            assert not question.ask()
            now[0] += seconds
        assert len(collectives) <= expected + 1, seconds
    question.signals.append(15)
    assert any(question.ask() for _ in range(64))


# ---- launched ranks


def errors_of(ranks):
    return [line for rank in ranks for line in rank.output()[1].splitlines() if line.startswith("error: ")]


@pytest.mark.chaos
def test_ranks_wait_longer_than_the_timeout_of_collectives(tiny, tmp_path):
    """A collective of gloo may take two seconds here, and rank 1 sleeps for five while it prepares its data."""
    ranks = start_ranks(2, *tiny(max_steps=3, save_model=tmp_path / "run"), patch=sleep_while_building)
    assert [rank.wait(120) for rank in ranks] == [0, 0], [rank.output() for rank in ranks]
    assert len(read_metrics(tmp_path / "run", "loss")) == 3


@pytest.mark.chaos
@pytest.mark.parametrize("sees_processes", [True, False])
def test_a_killed_rank_is_noticed_where_collectives_block_forever(tiny, tmp_path, sees_processes, monkeypatch):
    """As NCCL's do. Without a look at the process, as from another machine, it takes the limit of 45 seconds."""
    monkeypatch.setenv("HF_MYLLM_TEST_SEES", str(int(sees_processes)))
    run = tmp_path / "run"
    flags = [*tiny(epochs=2000, save_freq=5, save_model=run), "--eval_freq", "null"]
    ranks = start_ranks(2, *flags, patch=block_in_collectives)
    wait_for(ranks, has_reached(run, 12))
    started = time.monotonic()
    ranks[1].send_signal(signal.SIGKILL)
    code, seconds = ranks[0].wait(100), time.monotonic() - started
    print(f"noticed and ended after {seconds:.1f} s")
    assert code == 2
    (error,) = errors_of(ranks)
    assert "rank 0 of 2, in step " in error
    assert f"rank 1 on {peers_module._this_process()[0]}" in error
    assert "--init_from resume" in error
    checkpoints = list(run.glob("checkpoint-*[0-9]"))
    assert checkpoints
    assert all((path / "trainer_state" / "complete.json").exists() for path in checkpoints)


@pytest.mark.chaos
def test_stopped_ranks_go_on(tiny, tmp_path):
    """For 25 seconds, of the 45 that are allowed; then all of them together, as a laptop that is suspended."""
    run = tmp_path / "run"
    ranks = start_ranks(2, *tiny(epochs=30, save_model=run), patch=block_in_collectives)
    wait_for(ranks, has_reached(run, 5))
    for stopped, seconds in ((ranks[1:], 25), (ranks, 50)):
        for rank in stopped:
            rank.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        for rank in stopped:
            os.kill(rank.pid, signal.SIGCONT)
        time.sleep(1)
    assert [rank.wait(120) for rank in ranks] == [0, 0], [rank.output() for rank in ranks]
