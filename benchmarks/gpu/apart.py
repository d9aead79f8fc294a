"""A check in a process of its own: a crash, a hang or a full memory costs its rows alone."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.bar import SkipError


def apart(work: Callable[[], Any], log: Path, seconds: float) -> Any:
    """Call it in a fork of this process, with what it prints in a file; returns what it returns.

    Forks share what is imported; this process itself must never touch the GPU.

    Raises:
        SkipError: It said that it can't be run here.
        RuntimeError: It raised something else, ended otherwise, or took longer.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, sender, log))
    process.start()
    sender.close()
    assert process.pid is not None
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"not done after {seconds:.0f} s, and ended")
        error, answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with {process.exitcode}; {log.name} may say more") from None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.kill()
        process.join()
    if error is not None:
        raise error(answer)
    return answer


def _answer(work: Callable[[], Any], sender: Connection, log: Path) -> None:
    os.setsid()
    with log.open("w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            answer: tuple[type[Exception] | None, Any] = None, work()
        except SkipError as reason:
            answer = SkipError, str(reason)
        except BaseException as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            answer = RuntimeError, text if len(text) <= 500 else f"{text[:200]} ... {text[-300:]}"
        sender.send(answer)
