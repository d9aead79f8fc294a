"""A worker process seen from outside: start it, ask it with a deadline, kill it."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from typing import Any

from rlif_lightning.errors import UserError

STARTUP_SECONDS = 120.0

COMMAND = (sys.executable, "-P", "-m", "rlif_lightning.grading.worker")  # -P: nothing from the user's folder


class WorkerTimeoutError(Exception):
    """The worker did not answer in time."""


class WorkerDiedError(Exception):
    """The worker ended without an answer."""


class WorkerProcess:
    """One worker. It is started by a fresh interpreter, so neither threads nor memory are shared."""

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ready = False
        self._requests = 0
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=os.name == "posix",
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        threading.Thread(target=self._read, name="grading-reader", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait_ready(self, seconds: float = STARTUP_SECONDS) -> None:
        """Wait until the worker has imported what it needs.

        Raises:
            UserError: It cannot import math-verify.
            WorkerDiedError: It ended, or took longer than `seconds`.
        """
        if self._ready:
            return
        try:
            message = self._next(time.monotonic() + seconds)
        except WorkerTimeoutError:
            self.kill()
            raise WorkerDiedError("the grading worker did not start in time") from None
        if not message.get("ready"):
            self.kill()
            raise UserError(
                "Answers cannot be compared: math-verify cannot be imported",
                got=message.get("reason"),
                do='pip install "math-verify>=0.9", or set answers.compare to text',
            )
        self._ready = True

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request, anything that JSON can hold, and wait for its answer.

        Raises:
            WorkerTimeoutError: No answer in `seconds`; the worker is still busy and should be killed.
            WorkerDiedError: The worker ended.
        """
        self._requests += 1
        deadline = time.monotonic() + seconds
        line = json.dumps({**request, "id": self._requests, "seconds": seconds}) + "\n"
        try:
            self._stdin.write(line)
            self._stdin.flush()
        except (OSError, ValueError):
            raise WorkerDiedError("the grading worker has ended") from None
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._requests:
                return answer

    def kill(self) -> None:
        """End the process at once and collect it."""
        for step in (self._process.kill, self._stdin.close, lambda: self._process.wait(timeout=5)):
            with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
                step()

    def _next(self, deadline: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise WorkerTimeoutError from None
        if line is None:
            raise WorkerDiedError("the grading worker has ended")
        try:
            message = json.loads(line)
        except ValueError:
            raise WorkerDiedError("the grading worker answered nonsense") from None
        return message if isinstance(message, dict) else {}

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._stdout as answers:
            for line in answers:
                self._lines.put(line)
        self._lines.put(None)
