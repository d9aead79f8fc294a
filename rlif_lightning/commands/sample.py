"""``rlif sample``: what a run's model answers to questions from the command line, a pipe or a terminal."""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlif_lightning.cli.recipe_objects import RecipeObjects
from rlif_lightning.cli.recipes import given_recipes
from rlif_lightning.cli.run_objects import RunObjects, run_settings
from rlif_lightning.cli.strangers import TRUST, add_trust
from rlif_lightning.data.batch_plan import MOST_COMPLETIONS
from rlif_lightning.data.limits import check_prompts
from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.evaluation.answering import Answered, Attempts, answer_problems
from rlif_lightning.grading import Grader
from rlif_lightning.models.policy import Policy


def main(words: list[str]) -> None:
    """Run the command: answer the questions that are given, else those of a pipe, else what somebody types."""
    plain, settings = _plain_words(words)
    run = [] if given_recipes(settings) else plain[:1]
    given = plain[len(run) :]
    if not run and not settings:
        raise UserError("rlif sample needs a run", expected='rlif sample RUN "question"')
    if run and (Path(run[0]).expanduser() / "config.json").is_file():  # a model that was not trained here
        objects = RecipeObjects("sample", ["--model.name", *run, *settings], _add_options)
    else:
        objects = RunObjects("sample", run_settings([*run, *settings]), _add_options)
    asked = Asked(objects)
    if given or sys.stdin is None or not sys.stdin.isatty():
        words = [os.fsencode(word).decode(errors="replace") for word in given if word.strip()]
        questions = words if given else list(_piped())
        if not questions:
            do = 'rlif sample RUN "question", or one question a line from a pipe'
            raise UserError("There is no question", do=do)
        asked.answer(questions)
        return
    print(f"{asked.policy.identity.model}: a question per line; Ctrl-D ends.", file=sys.stderr)
    for question in _typed():
        try:
            asked.answer([question])
        except UserError as error:  # of this question, such as one that is too long
            print(f"error: {error}", file=sys.stderr)


def _add_options(parser: Any) -> None:
    add = parser.add_argument
    add("--temperature", type=float, default=0.0, help="Sampling temperature; 0: the most likely token each time.")
    longest = "Longest answer in tokens; null: evaluation.max_new_tokens of the run."
    add("--max_new_tokens", type=int | None, default=None, help=longest)
    add("--samples", type=int, default=1, help="Answers per question.")
    add_trust(parser)


def _plain_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Questions and run folder, and the words of settings; a setting without = is followed by its value.

    After ``--`` all words are plain, and so is one with a space before any =, such as "-x + 3 = 5".
    """
    plain: list[str] = []
    settings: list[str] = []
    end = words.index("--") if "--" in words else len(words)
    for before, word in zip(["", *words], words[:end], strict=False):
        is_value = _is_name(before) and "=" not in before and before != TRUST
        (settings if _is_name(word) or is_value else plain).append(word)
    return [*plain, *words[end + 1 :]], settings


def _is_name(word: str) -> bool:
    return word.startswith("-") and " " not in word.partition("=")[0]


def _piped() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return (line.strip() for line in sys.stdin or () if line.strip())


def _typed() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


class Asked:
    """A model that is asked questions."""

    def __init__(self, objects: RecipeObjects) -> None:
        self.objects, self.count = objects, 0
        self.engine = objects.evaluation.engine(objects.module)
        options, usual = objects.options, objects.evaluation.attempts
        samples, greedy = options.samples, options.temperature == 0
        check_ranges("", ("samples", samples, 1 <= samples <= MOST_COMPLETIONS, f"1 to {MOST_COMPLETIONS}"))
        if greedy and samples > 1:
            wrong = "At temperature 0 all answers to a question are the same"
            raise UserError(wrong, got=f"--samples {samples}", do="give --temperature 1 as well")
        most = usual.sampling.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
        sampling = replace(usual.sampling, max_new_tokens=most, temperature=options.temperature or 1.0)
        self.attempts = Attempts(sampling, 0 if greedy else samples, greedy, usual.batch_size)
        objects.data.template.check(objects.module.tokenizer)

    @cached_property
    def policy(self) -> Policy:
        """The model, loaded when it is first needed."""
        if self.objects.options.ckpt_path is not None:
            print(f"weights: {self.objects.options.ckpt_path}", file=sys.stderr)
        return self.objects.policy()

    def answer(self, questions: Sequence[str]) -> None:
        """Print the answers, each question before its own where there are several."""
        for result in self._answers(questions):
            if len(questions) > 1:
                print(f"> {result.problem}")
            for attempt in result.greedy + result.samples:
                print(attempt.text if attempt.ended else f"{attempt.text} [...]", flush=True)
            if len(questions) > 1:
                print()

    def _answers(self, questions: Sequence[str]) -> list[Answered]:
        objects = self.objects
        prompts = [self._prompt(question) for question in questions]
        check_prompts(prompts, "evaluation", objects.module, self.engine, self.attempts.sampling, objects.device)
        # The number seeds: a question that is asked again gets other samples.
        numbered = list(enumerate(prompts, start=self.count))
        self.count += len(prompts)
        with closing(Grader(objects.data.answers_of("predict"))) as grader:
            return answer_problems(self.engine, self.policy, numbered, self.attempts, grader)

    def _prompt(self, question: str) -> Prompt:
        problem = Problem(question, None, place=f"The question {question[:40]!r}")
        return self.objects.data.template.encode(problem, self.objects.module.tokenizer)
