"""The processes of one run: they tell each other of a signal, and agree on what to do about it."""

import time
from contextlib import suppress

import torch
from torch import distributed


class Peers:
    """All processes of torch's default group; ``device`` is this one's, for the group's backend.

    One of them tells the others through the group's store, where nobody has to wait for anybody: they may sample
    completions of different lengths meanwhile. To agree takes all of them.
    """

    LOOK_SECONDS = 1.0  # between two looks into the store
    KEY = "rlif/signal"

    def __init__(self, device: torch.device) -> None:
        self._store = distributed.distributed_c10d._get_default_store()
        self._device, self._next_look, self._heard = device, 0.0, 0

    def tell(self, number: int) -> None:
        """Let the others hear of a signal; the process with the store may have gone."""
        with suppress(RuntimeError):
            self._store.set(self.KEY, str(number))

    def heard(self) -> int:
        """The signal that any process has told of; 0: none, or it is not time to look yet."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + self.LOOK_SECONDS
            self._heard = int(self._store.get(self.KEY)) if self._store.check([self.KEY]) else 0
        return self._heard

    def agree(self, number: int) -> int:
        """The highest number that any process gives or has heard; to be called on all.

        A signal that comes while this one waits reaches those that it waits for: they have heard of it.
        """
        highest = torch.tensor(max(number, self._heard), device=self._device)
        work = distributed.all_reduce(highest, distributed.ReduceOp.MAX, async_op=True)
        while not work.is_completed():
            time.sleep(1e-3)
        work.wait()
        return int(highest)
