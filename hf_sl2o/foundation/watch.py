"""Which rank is missing: what a failed collective does not say, asked of the ranks that are left.

torch ends a collective that waits for a rank by a time-out, and its words name an address, not a rank; often that of
another rank that ended for the same reason. So each rank has a thread here that writes into the store of the process
group that it is alive, and where its main thread is. Who finds out first why a collective failed tells all others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from .ranks import first_difference

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 10.0  # of a rank, until it counts as missing
_SHOWN = 200  # characters of an error of another rank

_entered = 0  # how often this process has watched: an alarm is of one block
_watches = False
_connection: tuple[Any, Any] = (None, None)  # a default store, and the thread's own connection to it


@contextlib.contextmanager
def watched_ranks(timeout: float = 1800.0) -> Iterator[None]:
    """A block in which a collective that fails, since a rank died or hangs, raises an error with that rank's number.

    Every rank enters the block. A collective fails at once where a process is gone, and after the process group's
    time-out where it hangs. If that time-out is still torch's default of 30 minutes, it becomes `timeout`: a Trainer
    on CPUs does not hand on its `ddp_timeout`. Collectives of NCCL end the process without an exception; so a rank
    that has waited for half of `timeout`, or hears why another one ended, logs a warning with the same words. Without
    several processes, and inside another such block, this does nothing.

    Args:
        timeout (`float`, *optional*, defaults to 1800.0): Seconds; of a Trainer `args.ddp_timeout`, whose default
            this is.

    Raises:
        `RuntimeError`: a collective failed; says which rank is silent, ended with an error, or is elsewhere.

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o.foundation.watch import watched_ranks
    >>> with watched_ranks(timeout=600.0):  # one process: nothing to watch
    ...     total = torch.ones(3).sum()
    ```
    """
    global _entered, _watches
    store = None if _watches else _store_of_its_own()
    if store is None:
        yield
        return
    _replace_default_timeout(timeout)
    _entered += 1
    _watches, watch = True, _Watch(store, timeout, _entered)
    try:
        yield
    except BaseException as error:
        if not _is_of_a_collective(error):
            watch.alarm(f"rank {dist.get_rank()} ended with {_said(error)}")
            raise
        cause = watch.cause(error)
        watch.alarm(cause)
        raise RuntimeError(
            f"rank {dist.get_rank()} cannot go on, since a collective failed: {cause}; see the outputs of all "
            "ranks, and resume from the last checkpoint"
        ) from error
    finally:
        watch.leave()
        _watches = False


def _store_of_its_own() -> Any:
    """A connection for the thread: the main thread may wait on its own one. None: there is nothing to watch.

    There is one for all blocks: making one takes torch up to five seconds now and then.
    """
    global _connection
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    if get is None:
        return None
    if (store := get()) is not _connection[0]:
        _connection = store, store.clone()
    return _connection[1]


def _replace_default_timeout(seconds: float) -> None:
    """Leaves alone what somebody has chosen."""
    of_torch = dist.distributed_c10d
    group = of_torch._get_default_group()
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if getattr(options, "_timeout", None) != of_torch.default_pg_timeout:
            return
    of_torch._set_pg_timeout(timedelta(seconds=seconds))


def _is_of_a_collective(error: BaseException) -> bool:
    """gloo's errors have no class of their own."""
    named = any(name in str(error).lower() for name in ("gloo/", "nccl"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and named)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_SHOWN]


def _place(of: BaseException | FrameType | None) -> str:
    """The innermost function of an error, or of what runs."""
    if isinstance(of, BaseException):
        frames = traceback.extract_tb(of.__traceback__)
    else:
        frames = traceback.extract_stack(of, limit=1)
    return f"{frames[-1].name} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"


class _Watch:
    """A thread that says that this rank is alive, and listens to the others; it alone talks to the store.

    The store may be held by a process that hangs, and what waits for it then waits for ever.
    """

    def __init__(self, store: Any, timeout: float, number: int) -> None:
        self._store, self._rank, self._world = store, dist.get_rank(), dist.get_world_size()
        self._half, self._silence = timeout / 2, min(_SILENCE_SECONDS, timeout / 2)
        self._beat_seconds, self._look_seconds = min(_BEAT_SECONDS, timeout / 20), timeout / 10
        # A store may outlive the processes that torchrun starts again; they have numbers of their own then.
        self._head = f"hf_sl2o/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._alarm_key = f"{self._head}/alarm/{number}"
        self._main, self._failed_at = threading.get_ident(), ""
        self._lock = threading.Lock()
        self._heard: dict[int, tuple[dict[str, Any], float, int]] = {}  # by rank: last words, since when, how many
        self._own_alarm, self._alarm = "", ""  # what this rank found; what all are told
        self._contact, self._is_gone = time.monotonic(), False
        self._asked, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hf_sl2o watch", daemon=True)
        self._thread.start()

    def cause(self, error: BaseException) -> str:
        """Why a collective failed."""
        self._failed_at = _place(error)
        with self._lock:
            counts = {rank: count for rank, (_, _, count) in self._heard.items()}
        end, found = time.monotonic() + 3 * self._silence, ""
        self._asked.set()
        while not found and time.monotonic() < end:
            time.sleep(self._beat_seconds / 5)
            # a word may be older than the failure, the second one is not
            found = self._alarm or self._store_gone() or self._silent(self._silence)
            if not found and (places := self._places(counts, 2)):
                found = _elsewhere(places) or f"all ranks are in {places[0]}: look at the network between them"
        return found or f"no rank was found to be missing within {3 * self._silence:g} s ({_said(error)})"

    def alarm(self, text: str) -> None:
        """Tells all ranks, and waits until they have heard it: the store may end with this process."""
        self._own_alarm = text
        time.sleep(3 * self._beat_seconds)

    def leave(self) -> None:
        """Says that this rank is no longer in the block."""
        self._ended.set()
        self._thread.join(3 * self._beat_seconds)

    # What the thread does

    def _run(self) -> None:
        count, place, since, looked, warned = 0, "", time.monotonic(), 0.0, False
        try:
            while not self._ended.wait(self._beat_seconds if count else 0.0):
                now = time.monotonic()
                at = self._failed_at or _place(sys._current_frames().get(self._main))
                place, since = (place, since) if at == place else (at, now)
                self._say(at, count)
                if self._asked.is_set() or now - looked >= self._look_seconds:
                    self._look()
                    looked = now
                if not warned and not self._asked.is_set() and not self._own_alarm:
                    warned = self._warn(now - since)
                count += 1
            self._say("outside", None)
        except dist.DistError:
            self._is_gone = True

    def _say(self, at: str, count: int | None) -> None:
        key = f"{self._head}/{self._rank}"
        self._store.set(key, json.dumps({"at": at, "beat": count}))
        if self._own_alarm and not self._alarm:
            self._store.compare_set(self._alarm_key, "", self._own_alarm)  # the first one stays
        if self._store.check([self._alarm_key]):
            self._alarm = self._store.get(self._alarm_key).decode()
        self._contact = time.monotonic()

    def _look(self) -> None:
        for rank in range(self._world):
            key = f"{self._head}/{rank}"
            words = json.loads(self._store.get(key)) if self._store.check([key]) else {}
            with self._lock:
                known, _, count = self._heard.get(rank, (None, 0.0, -1))
                if words != known:
                    self._heard[rank] = words, time.monotonic(), count + 1

    def _warn(self, still: float) -> bool:
        """Whether there was a reason: an alarm, a silent rank, or half of the time-out spent in one place."""
        found = self._alarm or self._silent(self._half)
        if not found and still >= self._half and not self._silent(2 * self._look_seconds + self._beat_seconds):
            found = _elsewhere(self._places({}, 1))
        if found:
            logger.warning("rank %d may wait in vain: %s", self._rank, found)
        return bool(found)

    # What was heard

    def _store_gone(self) -> str:
        if not self._is_gone and time.monotonic() - self._contact < self._silence:
            return ""
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        holder = "the launcher on the first host" if by_launcher else "rank 0"
        return f"{holder} ({where}), which holds the process group's store, does not answer"

    def _silent(self, seconds: float) -> str:
        """Names ranks that are in the block, or never came, and have not been heard for so long."""
        now = time.monotonic()
        with self._lock:
            silent = [
                str(rank)
                for rank, (words, since, _) in sorted(self._heard.items())
                if rank != self._rank and words.get("beat", 0) is not None and now - since >= seconds
            ]
        if not silent:
            return ""
        those = f"rank {silent[0]} has" if len(silent) == 1 else f"ranks {', '.join(silent)} have"
        return f"{those} not answered for {seconds:g} s: killed, stopped, or cut off from the network"

    def _places(self, counts: dict[int, int], anew: int) -> list[str]:
        """Where the ranks are; [] until each has been heard so many times since `counts` were taken."""
        with self._lock:
            heard = dict(self._heard)
        for rank in range(self._world):
            words, _, count = heard.get(rank, ({}, 0.0, -1))
            if words.get("beat", 0) is not None and count < counts.get(rank, -1) + anew:
                return []
        return [heard[rank][0].get("at", "nowhere") for rank in range(self._world)]


def _elsewhere(places: list[str]) -> str:
    """Names ranks that are not where others are, in words."""
    differs = first_difference([{"the place of the main thread": place} for place in places])
    return f"no rank is missing, but {differs}" if differs else ""
