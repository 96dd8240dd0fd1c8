"""Wait for the other ranks, and notice when one has died, through the process group's store.

A collective has a timeout, and NCCL's blocks forever when a rank is gone. Here no collective takes part: a rank waits
by reading a counter, however much longer another takes, and a thread of each rank writes a number every few seconds and
reads that of the next rank. The thread counts its own rounds instead of reading a clock: a process that was paused, or
a machine that was suspended, has missed one round and not an hour.
"""

import itertools
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch

from .errors import PeerFailure, RankError, first_line, printable

BEAT_SECONDS = 5.0
MAX_MISSED = 9  # rounds in which a rank may be silent: as long as it may hold Python's lock or be stopped
GRACE_SECONDS = 5.0  # for the main thread to meet the failure by itself, before the process is ended
_GONE, _MAX_POLL = b"gone", 0.5  # seconds
_numbers = itertools.count()  # of the runs of this process, which share a store


class Peers:
    """The ranks of a run, as one of them sees them.

    Args:
        store: of the process group; None for a single process.
        phase: called for what this rank was doing, for messages.
    """

    def __init__(self, store, rank=0, world_size=1, phase=lambda: "its preparation"):
        self.rank, self.world_size, self.phase = rank, world_size, phase
        self.watched, self.beats, self.missed, self.waits, self.seen = (rank + 1) % world_size, 0, 0, 0, None
        self.problem, self.is_reporter, self.has_failed = None, False, False
        self.before_exit = lambda: None  # called when the thread ends the process
        self.lock, self.stopped, self.thread = threading.RLock(), threading.Event(), None
        if world_size == 1:
            return
        # A connection of its own: a thread that waits at the store holds its connection.
        self.store = torch.distributed.PrefixStore(f"hf_myllm/{next(_numbers)}", store.clone())
        self.store.set_timeout(timedelta(seconds=BEAT_SECONDS * MAX_MISSED))
        self.store.add("failed", 0)
        self.store.set(f"process/{rank}", " ".join(map(str, _this_process())))
        self.store.set(f"beat/{rank}", "0")

    def start(self):
        """Start the thread; the ranks have all been constructed when the first collective returns."""
        if self.world_size > 1:
            self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self.thread.start()

    # ---- waiting

    def wait(self):
        """Wait until all ranks have called this as often as this one, without a limit of time.

        Raises:
            RankError: a rank has died or failed.
        """
        if self.world_size == 1:
            return
        self.waits += 1
        key, delay = f"wait/{self.waits}", 0.001
        count = self.store.add(key, 1)
        while count < self.world_size:
            if self.problem is not None:
                raise self.error()
            time.sleep(delay)
            delay, count = min(_MAX_POLL, 1.5 * delay), int(self.store.get(key))

    def leave(self):
        """End together with the other ranks; rank 0 last, whose process may be the store's."""
        if self.world_size == 1:
            return
        self.wait()
        self.stop()
        with suppress(torch.distributed.DistError):
            self.store.add("left", 1)
            self._outlast("left")

    def _outlast(self, key):
        """Wait on rank 0, whose process may be the store's, until all ranks have counted themselves, a few seconds."""
        end = time.monotonic() + GRACE_SECONDS
        while self.rank == 0 and int(self.store.get(key)) < self.world_size and time.monotonic() < end:
            time.sleep(0.01)

    def stop(self, failed=False):
        """End the thread.

        Args:
            failed: tell the other ranks that this one cannot go on.
        """
        if self.world_size == 1 or self.stopped.is_set():
            return
        self.stopped.set()
        with suppress(torch.distributed.DistError):
            if failed and not self.has_failed:
                self.store.add("failed", 1)
            self.store.set(f"beat/{self.rank}", _GONE)
            if failed:  # ranks with the same mistake ask the store who prints it
                self._outlast("failed")
        if self.thread is not None:
            self.thread.join(1)

    # ---- failures

    def is_first_failure(self):
        """Record that this rank has failed; return whether no other has before, which then prints nothing."""
        if self.world_size == 1:
            return True
        try:
            with self.lock:
                if self.problem is not None:  # the thread has recorded it
                    return self.is_reporter
                self.has_failed = True
                return self.store.add("failed", 1) == 1
        except torch.distributed.DistError:  # the store is gone with the process that kept it
            return self.rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    def error(self):
        """Return the exception for what the thread has noticed; None without.

        It stays one to print however often this is called: what raises it first may not come to print it, because
        another error follows or the thread ends the process.
        """
        with self.lock:
            if self.problem is None:
                return None
            return RankError(self.problem) if self.is_reporter else PeerFailure(self.problem)

    def find_dead(self):
        """Return which ranks have died, in words, after a collective has failed; it may take as long as the limit."""
        try:
            silent = {rank: self.store.get(f"beat/{rank}") for rank in range(self.world_size) if rank != self.rank}
            for missed in range(MAX_MISSED + 1):
                silent = {rank: beat for rank, beat in silent.items() if beat != _GONE and beat == self._beat_of(rank)}
                if dead := [rank for rank in silent if self._has_exited(rank)]:
                    return self._describe(dead, "was killed or ran out of memory")
                if not silent or missed == MAX_MISSED or self.stopped.wait(BEAT_SECONDS):
                    break
            return self._describe(list(silent), _silence()) if silent else "another rank was killed"
        except torch.distributed.DistError:
            return "rank 0, or the launcher beside it, cannot be reached; see its error above, if it printed one"

    def _describe(self, ranks, what):
        named = " and ".join(f"rank {rank} on {self._process(rank)[0]}" for rank in ranks[:3])
        return f"{named}{f' and {len(ranks) - 3} more' if len(ranks) > 3 else ''} {what}"

    def _beat_of(self, rank):
        return self.store.get(f"beat/{rank}")

    def _process(self, rank):
        host, machine, pid = self.store.get(f"process/{rank}").decode().split(" ")
        return host, machine, int(pid)

    def _has_exited(self, rank):
        """Return whether the process of a rank on this machine has ended; False if that cannot be seen."""
        host, machine, pid = self._process(rank)
        if (host, machine) != _this_process()[:2] or not sys.platform.startswith("linux"):
            return False
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                return file.read().rpartition(")")[2].split()[0] in "ZX"  # not waited for yet
        except OSError:
            return True

    # ---- the thread

    def _run(self):
        while not self.stopped.wait(BEAT_SECONDS):
            self.beat()
            if self.problem is not None:
                return self._end_process()

    def beat(self):
        """Write this rank's next number, and set `problem` if another rank has failed or the next one is dead."""
        try:
            self.beats += 1
            self.store.set(f"beat/{self.rank}", str(self.beats))
            with self.lock:  # the main thread counts a failure of its own either before this or after it
                if not self.has_failed and self.problem is None:  # else it ends
                    self._watch()
        except torch.distributed.DistError as error:
            if not self.stopped.is_set():
                problem = f"rank 0, or the launcher beside it, cannot be reached ({first_line(error)[:100]})"
                self._notice(problem, is_reporter=self.rank == 1 or os.environ.get("LOCAL_RANK") == "0")

    def _watch(self):
        seen, num_failed = self._beat_of(self.watched), int(self.store.get("failed"))
        self.missed = self.missed + 1 if seen == self.seen and seen != _GONE else 0
        self.seen = seen
        if num_failed:
            self._notice("another rank failed first", is_reporter=False)
        elif self.missed >= MAX_MISSED or (self.missed and self._has_exited(self.watched)):
            has_exited = self.missed < MAX_MISSED
            problem = self._describe([self.watched], "was killed" if has_exited else _silence())
            self._notice(problem, is_reporter=self.store.add("failed", 1) == 1)

    def _notice(self, problem, is_reporter):
        again = "--init_from resume continues from the newest checkpoint"
        with self.lock:
            self.is_reporter = is_reporter
            self.problem = f"rank {self.rank} of {self.world_size}, in {self.phase()}: {problem}; {again}"

    def _end_process(self):
        """End this process if its main thread does not: a collective of NCCL whose rank is gone never returns."""
        if self.stopped.wait(GRACE_SECONDS):
            return
        if not isinstance(error := self.error(), PeerFailure):
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        self.before_exit()
        os._exit(2)


def _silence():
    return f"has not answered for {BEAT_SECONDS * MAX_MISSED:.0f} s: it was killed, or its machine is down"


def _this_process():
    """Return the host, what tells its process ids from those of another container, and the id of this process."""
    namespace = 0
    with suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return socket.gethostname().replace(" ", "-") or "?", str(namespace), os.getpid()
