"""Grade completions: cheap comparisons here, formulas in a worker process that can be killed."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress

from rlif_lightning.errors import UserError
from rlif_lightning.grading.answers import AnswerFormat, Gold
from rlif_lightning.grading.compare import Rule, same_text, too_costly
from rlif_lightning.grading.literals import canonical_literal, same_literal
from rlif_lightning.grading.normalise import answer_key, clean, split_answers
from rlif_lightning.grading.process import STARTUP_SECONDS, WorkerProcess
from rlif_lightning.runs.signals import look

REMEMBERED = 50_000
STARTS = 3
ROLLOUT_SECONDS = 60.0
"""Time that all formulas of a rollout have in each process; an honest one takes some hundredths of a second."""


class _BudgetSpent(TimeoutError):
    """The time of all answers together is over."""


class Grader:
    """Reads answers out of completions and tells which are right.

    Most answers equal the right one as text or differ from it as numbers, and are decided at once. The others
    go to a worker process, one at a time, each with a limit of time: an answer that exceeds it is wrong, its
    worker is killed, and a spare that has already imported everything takes over. Workers start with the
    first answer that needs one and end with this object; from then on it can't be copied. One thread at a time.
    A signal ends it between two answers.

    Args:
        format: Where answers stand and how they are compared.
        seconds: Limit of time per answer, counted from when a ready worker receives it.
        budget: Limit for all formulas after a :meth:`begin` together, workers that are replaced included. What is
            not known when it is used up counts as wrong, and as equal to nothing, until the next one.

    Attributes:
        timeouts: How many answers ran out of time, their own or that of all, since the last :meth:`begin`.
        errors: How many answers made the comparison fail (they are wrong).
    """

    def __init__(self, format: AnswerFormat, seconds: float = 1.5, budget: float = math.inf) -> None:
        self.format, self.seconds, self.budget = format, seconds, budget
        self.errors = 0
        self._left = seconds
        self._verdicts: dict[tuple[str, Gold], bool] = {}
        self._slow: set[str] = set()
        self._workers: list[WorkerProcess] = []
        self.begin()

    def begin(self) -> None:
        """Begin a rollout, which has the whole budget."""
        self.timeouts, self._rest = 0, self.budget
        self._given_up: set[str] = set()

    def grade(self, items: Sequence[tuple[str, bool, Gold]]) -> list[bool]:
        """Which completions are right, of each its text, whether it ended by itself, and the right answer."""
        return [self._grade(self._read(text, ended), gold) for text, ended, gold in items]

    def extract_answers(self, items: Sequence[tuple[str, bool]]) -> list[str | None]:
        """[N] normalised answers by which completions can be grouped, without knowing the right one.

        None stands where there is none, or none of a plausible size. `items` are as those of `grade`.
        """
        return [self._key(self._read(text, ended)) for text, ended in items]

    def answer_spans(self, items: Sequence[tuple[str, bool]]) -> list[tuple[int, int] | None]:
        """The characters [start, end) of each answer of `extract_answers`; None where that gives None."""
        found = [self.format.locate(text, ended) for text, ended in items]
        return [(f.start, f.end) if f and self._key(f.text) is not None else None for f in found]

    def classes(self, answers: Sequence[str | None]) -> list[int | None]:
        """Number the classes of equivalent answers of `extract_answers` from 0, in order; None stays None.

        Equivalence is asked against the first answer of each class, so a class can't grow by steps. An answer
        whose comparison runs out of time is found out once and stands alone.
        """
        known: dict[str, int] = {}
        first: list[str] = []
        for answer in answers:
            if answer is None or answer in known:
                continue
            self._equals(answer, "0")  # a formula that nothing but time ends shows here
            same = next((other for other in first if self._equals(answer, other)), answer)
            if same == answer:
                first.append(answer)
            known[answer] = first.index(same)
        return [None if answer is None else known[answer] for answer in answers]

    def close(self) -> None:
        """End the worker processes; the next answer that needs one starts them again."""
        while self._workers:
            self._workers.pop().kill()

    def _equals(self, answer: str, other: str) -> bool:
        """Whether two answers are equal; one that ran out of time equals no other from then on."""
        if not {answer, other}.isdisjoint(self._slow | self._given_up):
            return False
        before = self.timeouts
        same = self._grade(answer, Gold(other))
        if self.timeouts > before and answer not in self._given_up:
            self._slow.add(answer)
        return same

    def _read(self, text: str, ended: bool) -> str | None:
        look()
        found = self.format.locate(text, ended)
        return found.text if found else None

    def _key(self, answer: str | None) -> str | None:
        if answer is None or self.format.compare == "exact":
            return answer
        if self.format.compare == "literal":
            return canonical_literal(answer)
        if too_costly(answer):
            return None
        if self.format.several == "one" or self.format.compare == "text":
            return answer_key(clean(answer)) or None
        keys = [answer_key(clean(part)) for part in split_answers(answer)]
        if self.format.several == "set":
            keys = sorted(set(keys))
        return ",".join(filter(None, keys)) or None

    def _grade(self, answer: str | None, gold: Gold) -> bool:
        if answer is None:
            return False
        if self.format.compare == "literal":
            return same_literal(gold.text, answer)
        if self.format.compare == "exact" or too_costly(answer):
            return answer.strip() == gold.text.strip()
        if self.format.compare == "text":
            return same_text(gold.text, answer, gold.unit)
        if (answer, gold) not in self._verdicts:
            if len(self._verdicts) >= REMEMBERED:
                self._verdicts.clear()
            rule = Rule(self._ask, self.format.several, gold.unit, gold.tolerance, self.format.relative_tolerance)
            self._left = self.seconds
            try:
                self._verdicts[answer, gold] = rule.equal(gold.text, answer)
            except _BudgetSpent:
                self.timeouts += answer not in self._given_up
                self._given_up.add(answer)
                return False
            except TimeoutError:
                self.timeouts += 1
                self._verdicts[answer, gold] = False
        return self._verdicts[answer, gold]

    def _ask(self, *formulas: str | float) -> bool:
        """Let the worker compare two formulas in the time that is left; whatever goes wrong makes them differ.

        Raises:
            TimeoutError: The time of this answer, or of all of them, is over.
        """
        look()
        if self._rest <= 0:
            raise _BudgetSpent
        is_first, begin = not self._workers, time.monotonic()
        worker = self._ready_worker()
        start = time.monotonic()
        try:
            right = worker.ask(formulas, self._left)
        except TimeoutError:
            self._drop(worker)
            raise
        except (EOFError, OSError):
            self._drop(worker)
            right = None
        finally:
            end = time.monotonic()
            self._left = max(self._left - (end - start), 0.0)
            self._rest -= end - (start if is_first else begin)  # importing everything is not the answers' doing
        self.errors += right is None
        return bool(right)

    def _ready_worker(self) -> WorkerProcess:
        """The worker in use: alive and ready, with a spare one starting next to it."""
        why = ""
        for _ in range(STARTS):
            try:
                if not self._workers:
                    self._workers.append(WorkerProcess())
                self._workers[0].wait_ready()
            except (EOFError, OSError) as error:
                why = f": {error}" if str(error) else why
                if self._workers:
                    self._drop(self._workers[0])
            else:
                if len(self._workers) < 2:
                    with suppress(OSError):  # it can do without a spare one
                        self._workers.append(WorkerProcess())
                return self._workers[0]
        raise UserError(
            "Answers cannot be compared: the grading worker does not start",
            got=f"{STARTS} workers that ended, or took longer than {STARTUP_SECONDS:g} s{why}",
            do="try `python -m rlif_lightning.grading.worker < /dev/null`, or set answers.compare to text",
        )

    def _drop(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers.remove(worker)
