"""Signals that ask a command to end: the first ends it soon, with what can be saved; a second one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rlif_lightning.runs.peers import Peers

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
REQUEUE = 75  # EX_TEMPFAIL: SIGUSR1 is a scheduler's, which may begin the job again

When = Literal["at once", "at a look", "later"]
"""When a signal ends what runs: wherever it comes; where :func:`look` is called; where the caller of :func:`agreed`
says so."""


class Stopped(SystemExit):
    """A signal has asked this process to end; its code is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(REQUEUE if name_of(number) == "SIGUSR1" else 128 + number)
        self.number = number


class _State:
    number = 0  # the signal that came; 0: none
    since = 0.0
    when: When = "at once"
    peers: "Peers | None" = None  # None: this process works alone
    apart = False  # from its peers, which do not wait for it


def name_of(number: int) -> str:
    """Such as SIGTERM."""
    return signal.Signals(number).name


def agreed() -> int:
    """The signal that has asked any process of the run to end; 0: none. To be called on all of them."""
    return _State.number if _State.peers is None else _State.peers.agree(_State.number)


def look() -> None:
    """Raise Stopped if a signal came to any process, nothing is half done, and no process waits for this one."""
    if _State.when == "later" or (_State.when == "at a look" and _State.peers and not _State.apart):
        return
    number = _State.number or (_State.peers.heard() if _State.peers else 0)
    if number:
        raise Stopped(number)


def look_together() -> None:
    """As :func:`look`, at a place to which all processes come equally often: they end there together."""
    if _State.when == "at a look" and (number := agreed()):
        raise Stopped(number)


@contextmanager
def apart() -> Iterator[None]:
    """A block within which no process waits for another: where a signal ends it on one, it ends on all.

    Processes that sample take different numbers of tokens. Each ends its block at its next look, and then all agree.
    """
    if _State.peers is None or _State.when != "at a look":
        yield
        return
    _State.apart = True
    try:
        yield
    except Stopped:
        pass
    finally:
        _State.apart = False
    look_together()


@contextmanager
def shared_with(peers: "Peers | None") -> Iterator[None]:
    """A signal to one of several processes ends all of them within the block."""
    _State.peers = peers
    try:
        yield
    finally:
        _State.peers = None


def hold(when: When) -> None:
    """Say when a signal ends what follows."""
    _State.when = when


@contextmanager
def abandoned() -> Iterator[None]:
    """A block without which what is half done can go on: a signal ends the block at its next look, and only that."""
    if _State.when != "later":
        yield
        return
    _State.when = "at a look"
    try:
        yield
    except Stopped:
        pass
    finally:
        _State.when = "later"


@contextmanager
def handled() -> Iterator[None]:
    """Take these signals in the main thread within the block; those that are ignored, as under nohup, stay so."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers}
    if threading.current_thread() is not threading.main_thread() or _handle in before.values():
        yield
        return
    _State.number, _State.when = 0, "at once"
    taken = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
        _State.number, _State.when = 0, "at once"


def _handle(number: int, frame: Any) -> None:
    now = time.monotonic()
    if _State.number:
        # timeout signals a process and its group, torchrun passes on what the terminal has sent: that is one signal.
        same = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.01
        if number != _State.number or now - _State.since > same:
            os._exit(int(Stopped(number).code))  # type: ignore[arg-type]
        return
    _State.number, _State.since = number, now
    said = f"\n{name_of(number)}: stopping; a second signal ends it at once.\n"
    os.write(2, said.encode())  # not print: this may be within one
    if _State.peers is not None:
        _State.peers.tell(number)
    if _State.when == "at once":
        raise Stopped(number)
