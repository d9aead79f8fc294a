"""Grade completions: cheap comparisons here, formulas in a worker process that can be killed."""

import weakref
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlif_lightning.errors import UserError
from rlif_lightning.grading.answers import AnswerFormat, Gold
from rlif_lightning.grading.compare import Rule, equal, too_costly
from rlif_lightning.grading.literals import canonical_literal, same_literal
from rlif_lightning.grading.normalise import clean, normalise, split_answers, without_name
from rlif_lightning.grading.process import WorkerDiedError, WorkerProcess, WorkerTimeoutError

REMEMBERED = 50_000


class Grader:
    """Reads answers out of completions and tells which are right.

    Most answers equal the right one as text or differ from it as numbers, and are decided at once. The others
    go to a worker process, one at a time, each with a limit of time: an answer that exceeds it is wrong, its
    worker is killed, and a spare that has already imported everything takes over. Workers start with the
    first answer that needs one and end with this object. A pair of right and given answer is compared once.

    Not for several threads at once. A copy, and one sent to another process, starts its own workers.

    Args:
        format: Where answers stand and how they are compared.
        seconds: Limit of time per answer, counted from when a ready worker receives it.

    Attributes:
        timeouts: How many answers ran out of time.
        errors: How many answers made the comparison fail (they are wrong).
    """

    def __init__(self, format: AnswerFormat, seconds: float = 1.5) -> None:
        self.format = format
        self.seconds = seconds
        self.timeouts = 0
        self.errors = 0
        self._verdicts: dict[tuple[str, Gold], bool] = {}
        self._slow: set[str] = set()
        self._open()

    def grade(self, items: Sequence[tuple[str, bool, Gold]]) -> list[bool]:
        """Tell which completions are right.

        Args:
            items: For each completion its text, whether it ended by itself, and the right answer.

        Raises:
            UserError: An answer needs math-verify, which is not installed.
        """
        return [self._grade(self.format.find(text, ended), gold) for text, ended, gold in items]

    def extract_answers(self, items: Sequence[tuple[str, bool]]) -> list[str | None]:
        """Normalised answers by which completions can be grouped, without knowing the right one.

        Args:
            items: For each completion its text and whether it ended by itself.

        Returns:
            [N] answers; None where there is none, or none of a plausible size.
        """
        return [self._key(self.format.find(text, ended)) for text, ended in items]

    def answer_spans(self, items: Sequence[tuple[str, bool]]) -> list[tuple[int, int] | None]:
        """The characters [start, end) of each answer of `extract_answers`; None where that gives None."""
        found = [self.format.locate(text, ended) for text, ended in items]
        return [None if f is None or self._key(f.text) is None else (f.start, f.end) for f in found]

    def classes(self, answers: Sequence[str | None]) -> list[int | None]:
        """Number the classes of equivalent answers from 0, in the order of their first answers; None stays None.

        Equivalence is asked against the first answer of each class, so a class can't grow by steps. An answer
        whose comparisons run out of time is found out once and stands alone.

        Args:
            answers: Normalised, as :meth:`extract_answers` gives them.
        """
        known: dict[str, int] = {}
        first: list[str] = []
        for answer in answers:
            if answer is None or answer in known:
                continue
            others = [] if self._is_slow(answer) else [other for other in first if other not in self._slow]
            same = next((other for other in others if self._grade(answer, Gold(other))), None)
            if same is None:
                first.append(answer)
            known[answer] = first.index(same or answer)
        return [None if answer is None else known[answer] for answer in answers]

    def close(self) -> None:
        """End the worker processes; the next answer that needs one starts them again."""
        _end(self._workers)

    def _is_slow(self, answer: str) -> bool:
        """Whether any comparison of this answer runs out of time, whatever it is compared with."""
        before = self.timeouts
        if answer not in self._slow:
            self._grade(answer, Gold("0"))
        if self.timeouts > before:
            self._slow.add(answer)
        return answer in self._slow

    def _key(self, answer: str | None) -> str | None:
        if answer is None or self.format.compare == "exact":
            return answer
        if self.format.compare == "literal":
            return canonical_literal(answer)
        if too_costly(answer):
            return None
        if self.format.several == "one" or self.format.compare == "text":
            return normalise(without_name(clean(answer))[1]) or None
        parts = [normalise(without_name(part)[1]) for part in split_answers(answer)]
        if self.format.several == "set":
            parts = sorted(set(parts))
        return ",".join(part for part in parts if part) or None

    def _grade(self, answer: str | None, gold: Gold) -> bool:
        if answer is None:
            return False
        if self.format.compare == "exact":
            return answer == gold.text.strip()
        if self.format.compare == "literal":
            return same_literal(gold.text, answer)
        if self.format.compare == "text":
            if too_costly(answer):
                return answer == gold.text.strip()
            return normalise(answer, gold.unit) == normalise(gold.text, gold.unit)
        rule = Rule(self.format.several, gold.unit, gold.tolerances, self.format.relative_tolerance)
        verdict = equal(gold.text, answer, rule)
        if verdict is not None:
            return verdict
        known = self._verdicts.get((answer, gold))
        if known is None:
            if len(self._verdicts) >= REMEMBERED:
                self._verdicts.clear()
            known = self._verdicts[answer, gold] = self._ask(answer, gold, rule)
        return known

    def _ask(self, answer: str, gold: Gold, rule: Rule) -> bool:
        """Let the worker decide; whatever goes wrong with an answer makes it wrong."""
        worker = self._ready_worker()
        try:
            reply = worker.ask({"gold": gold.text, "answer": answer, "rule": asdict(rule)}, self.seconds)
        except (WorkerTimeoutError, WorkerDiedError) as error:
            self.timeouts += isinstance(error, WorkerTimeoutError)
            self.errors += isinstance(error, WorkerDiedError)
            self._drop(worker)
            return False
        if "error" in reply:
            self.errors += 1
            if reply["error"] == "MemoryError":
                self._drop(worker)
            return False
        return bool(reply["right"])

    def _ready_worker(self) -> WorkerProcess:
        """The worker in use: alive and ready, with a spare one starting beside it."""
        for attempt in range(3):
            while self._workers and not self._workers[0].alive:
                self._drop(self._workers[0])
            if not self._workers:
                self._workers.append(WorkerProcess())
            try:
                self._workers[0].wait_ready()
                break
            except WorkerDiedError as error:
                self._drop(self._workers[0])
                if attempt == 2:
                    raise UserError(
                        "Answers cannot be compared: the grading worker does not start",
                        got=error,
                        do="try `python -m rlif_lightning.grading.worker`, or set answers.compare to text",
                    ) from error
        if len(self._workers) < 2:
            self._workers.append(WorkerProcess())
        return self._workers[0]

    def _drop(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers.remove(worker)

    def _open(self) -> None:
        self._workers: list[WorkerProcess] = []
        # Runs when this object goes, and at the latest when the interpreter ends.
        weakref.finalize(self, _end, self._workers)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_workers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()


def _end(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()
