"""A worker process seen from outside: start it, ask it with a deadline, kill it."""

import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from rlif_lightning.errors import UserError
from rlif_lightning.runs.signals import look

STARTUP_SECONDS = 120.0
COMMAND = (sys.executable, "-P", "-m", "rlif_lightning.grading.worker")  # -P: nothing from the user's folder


class WorkerProcess:
    """One worker in a fresh interpreter, so that neither threads nor memory are shared; it ends with this object.

    ``kill`` ends it at once and collects it.
    """

    def __init__(self) -> None:
        self._ready = False
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=theirs.fileno(),  # a socket, for both directions
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the parent's business
            )
        self.kill = weakref.finalize(self, _end, self._process, self._connection)

    def wait_ready(self) -> None:
        """Wait until the worker has imported what it needs, which takes seconds once; it can't without math-verify.

        Raises:
            EOFError, OSError: It has ended, or does not start in time.
        """
        if self._process.poll() is not None:
            raise EOFError
        if self._ready:
            return
        end = time.monotonic() + STARTUP_SECONDS
        while not self._connection.poll(0.5) and time.monotonic() < end:
            look()
        if failure := self._receive(0):
            wrong = "Answers cannot be compared: math-verify cannot be imported"
            raise UserError(wrong, got=failure, do='pip install "math-verify>=0.9", or set answers.compare to text')
        self._ready = True

    def ask(self, formulas: Sequence[str | float], seconds: float) -> bool | None:
        """Send a question of `formulas_equal` and wait for its verdict; None: the comparison failed.

        Raises:
            TimeoutError: No answer in `seconds`; the worker is still busy and should be killed.
            EOFError, OSError: The worker ended.
        """
        self._connection.send_bytes(json.dumps([seconds, *formulas]).encode())
        return self._receive(seconds)

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise TimeoutError
        return json.loads(self._connection.recv_bytes())


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    process.kill()
    connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
