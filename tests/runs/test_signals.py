"""Where a signal ends what: alone, among several processes, while grading, and within vLLM."""

import os
import signal

import pytest

from rlif_lightning.grading import AnswerFormat, Gold, Grader
from rlif_lightning.grading.process import WorkerProcess
from rlif_lightning.runs import signals
from rlif_lightning.sampling import VLLMSampler
from rlif_lightning.sampling.vllm import engine


class Others:
    """Other processes, as this one sees them."""

    def __init__(self):
        self.said, self.told, self.agreements = 0, [], 0

    def tell(self, number):
        self.told.append(number)

    def heard(self):
        return self.said

    def agree(self, number):
        self.agreements += 1
        return max(number, self.said)


@pytest.fixture
def others():
    """Several processes between two rollouts."""
    with signals.handled(), signals.shared_with(found := Others()):
        signals.hold("at a look")
        yield found


@pytest.fixture
def alone():
    with signals.handled():
        signals.hold("at a look")
        yield


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_a_signal_ends_a_block_apart_and_the_others_hear_of_it(others):
    done = []

    def block():
        with signals.apart():
            kill()
            signals.look()
            done.append("never")

    with pytest.raises(signals.Stopped) as ended:
        block()
    assert ended.value.code == 143 and not done
    assert others.told == [signal.SIGTERM] and others.agreements == 1


def test_what_another_has_told_of_ends_it_too(others):
    others.said = signal.SIGUSR1
    with pytest.raises(signals.Stopped) as ended, signals.apart():
        signals.look()
    assert ended.value.code == 75 and others.agreements == 1


def test_one_that_is_done_ends_with_the_others(others):
    """It has sampled its share before the signal came to another."""
    others.said, done = signal.SIGTERM, []
    with pytest.raises(signals.Stopped), signals.apart():
        done.append("all")
    assert done == ["all"]


def test_where_others_wait_nobody_leaves_alone(others):
    kill()
    signals.look()
    assert others.agreements == 0
    with pytest.raises(signals.Stopped):
        signals.look_together()


def test_after_a_step_nothing_is_asked(others):
    signals.hold("later")
    kill()
    with signals.apart():
        signals.look()
    signals.look_together()
    assert others.agreements == 0 and signals.agreed() == signal.SIGTERM


def test_an_evaluation_that_is_given_up_is_given_up_by_all(others):
    signals.hold("later")
    others.said, done = signal.SIGTERM, []
    with signals.abandoned():
        with signals.apart():
            signals.look()
        done.append("never")
    assert not done and others.agreements == 1


def test_grading_ends_between_two_answers(alone, monkeypatch):
    asked = []

    def ask(self, formulas, seconds):
        asked.append(formulas)
        if len(asked) == 2:
            kill()
        return False

    monkeypatch.setattr(WorkerProcess, "wait_ready", lambda self: None)
    monkeypatch.setattr(WorkerProcess, "ask", ask)
    grader = Grader(AnswerFormat())
    items = [(rf"\boxed{{x+{n}}}", True, Gold("y")) for n in range(9)]
    with pytest.raises(signals.Stopped):
        grader.grade(items)
    grader.close()
    assert len(asked) == 2


def test_a_worker_that_starts_is_not_waited_for(alone):
    grader = Grader(AnswerFormat())
    kill()
    with pytest.raises(signals.Stopped):
        grader.grade([(r"\boxed{x+1}", True, Gold("1+x"))])
    grader.close()


def test_vllm_ends_between_two_steps_of_its_engine(alone, monkeypatch):
    class Engine:
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps == 3:
                kill()
            return []

    class LLM:
        llm_engine = Engine()

        def generate(self, prompts, parameters, use_tqdm):
            while self.llm_engine.steps < 1000:
                self.llm_engine.step()
            return prompts

    sampler = VLLMSampler()
    sampler._llm = LLM()
    monkeypatch.setitem(engine._ENGINES, "of this test", sampler._llm)
    with pytest.raises(signals.Stopped):
        sampler._generate([[1, 2]], [None])
    assert LLM.llm_engine.steps == 3 and not engine._ENGINES
    assert "step" not in vars(LLM.llm_engine)


def test_a_signal_belongs_to_the_command_that_it_came_to():
    """What runs afterwards in the same process is not asked to end."""
    with pytest.raises(signals.Stopped), signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
    signals.look()
    assert signals.agreed() == 0
