"""What classes of users and of Lightning raise, told with the setting, what Python said, file and line."""

import textwrap

import lightning.pytorch  # noqa: F401  its log goes to the stderr of its import, which must not be a test's
import pytest

from rlif_lightning.main import main

MODULE = """
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from rlif_lightning.rewards import InternalReward, Reward
from torch.optim import SGD


class Raising:
    def __init__(self, *args):
        self.read({})

    def read(self, settings):
        return settings["key"]  # line 15


class OwnCallback(Raising, Callback): ...
class OwnLogger(Raising, Logger):
    name = version = log_metrics = log_hyperparams = None
class OwnStrategy(Raising, SingleDeviceStrategy): ...
class OwnOptimizer(Raising, SGD): ...
class OwnReward(Raising, Reward):
    def __call__(self, rollout): ...


class WithoutCall(Reward): ...
class WithoutStatistic(InternalReward): ...


class WithoutSuper(Reward):
    def __init__(self, k: int = 1):
        self.k = k

    def __call__(self, rollout):
        return rollout.samples.lengths.float()


class InternalWithoutSuper(InternalReward):
    def __init__(self, k: int = 1):
        self.k = k

    def statistic(self, logp):
        return logp.sum(-1)


class Brevity(Reward):
    def __call__(self, rollout):
        return -rollout.samples.lengths.float()
"""


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """``refused({"a.py": text}, word, ...)``: the complaint of a fit with modules in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(modules, *words):
        for name, text in modules.items():
            (tmp_path / name).write_text(textwrap.dedent(text))
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "--config", "quickstart", "--model.name", "/nowhere/at/all", *words])
        out, err = capsys.readouterr()
        assert (exit_.value.code, out) == (2, "")
        assert err.startswith("error: ") and len(err.splitlines()) <= 3, err
        assert not (tmp_path / "runs").exists()
        return err

    return run


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("one", "def f(:", "one can't be imported: SyntaxError: invalid syntax (one.py, line 1)"),
        ("two", "\nfoo", "two can't be imported: NameError: name 'foo' is not defined (two.py, line 2)"),
        ("three", "import numpyy", "three needs numpyy, which is not installed (three.py, line 1)\n  do: pip install numpyy"),  # noqa: E501
        ("four", "from json import nothing", "four can't be imported: ImportError: cannot import name 'nothing'"),
        ("five", "raise KeyError('x')", "five can't be imported: KeyError: 'x' (five.py, line 1)"),
        ("six", "import sys\nsys.exit()", "six can't be imported: SystemExit: (six.py, line 2)"),
        ("seven", "class Odd(BaseException): ...\nraise Odd", "seven can't be imported: Odd: (seven.py, line 2)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("setting", ["rollout.rewards", "trainer.callbacks", "model.optimizer"])
def test_a_module_that_can_not_be_imported(setting, name, text, said, refused):
    name += setting[-3:]  # Python keeps modules by their names
    said = said.replace(name[:-3], name)
    assert f"error: {setting}: {said}" in refused({f"{name}.py": text}, f"--{setting}", f"{name}.Own")


def test_a_class_that_ends_the_program_when_it_is_made(refused):
    text = "import sys, torch\nclass Own(torch.optim.SGD):\n    def __init__(self, params):\n        sys.exit(0)\n"
    reward = text.replace("(self, params)", "(self)").replace("torch.optim.SGD", "Reward")
    own = {"ending.py": f"from rlif_lightning.rewards import Reward\n{reward}    def __call__(self, rollout): ..."}
    assert "rewards: Own can't be made: SystemExit: 0 (ending.py, line 5)" in refused(
        own, "--rollout.rewards=ending.Own"
    )
    words = ["--model.optimizer=ending_too.Own"]
    assert "model.optimizer: Own can't be made: SystemExit: 0" in refused({"ending_too.py": text}, *words)


def test_ctrl_c_while_a_module_is_imported_ends_as_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "stopping.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "quickstart", "--rollout.rewards", "stopping.Own"])
    assert end.value.code == 130 and "can't be imported" not in capsys.readouterr().err


def test_a_module_of_a_recipe_is_told_with_the_recipes_line(refused):
    recipe = "rollout:\n  rewards:\n  - class_path: SelfCertainty\n  - class_path: recipe_module.Own\n"
    message = refused({"recipe_module.py": "foo", "own.yaml": recipe}, "--config", "own.yaml")
    assert "own.yaml, line 4: rollout.rewards: recipe_module can't be imported: NameError" in message


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("trainer.callbacks", "OwnCallback"),
        ("trainer.logger", "OwnLogger"),
        ("trainer.strategy.class_path", "OwnStrategy"),
        ("model.optimizer", "OwnOptimizer"),
        ("rollout.rewards", "OwnReward"),
    ],
)
def test_a_class_that_can_not_be_made(setting, name, refused):
    message = refused({"raising.py": MODULE}, f"--{setting}", f"raising.{name}")
    setting = setting.removesuffix(".class_path")
    assert f"error: {setting}: {name} can't be made: KeyError: 'key' (" in message
    assert "raising.py, line 15)" in message  # in the folder of the first case, from which Python has it


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rewards_.WithoutCall"], ["rewards_.WithoutCall lacks a method", "define __call__(self, rollout)"]),
        (["[rewards_.WithoutStatistic]"], ["lacks a method", "define statistic(self, logp)"]),
        (["rewards_.WithoutSuper"], ["rewards_.WithoutSuper does not call", "super().__init__("]),
        (["rewards_.InternalWithoutSuper"], ["rewards_.InternalWithoutSuper does not call", "super().__init__("]),
        (
            ["Shuffled", "--rollout.rewards.reward", "rewards_.WithoutSuper"],
            ["rewards_.WithoutSuper does not call", "super().__init__("],
        ),
        (
            ["[rewards_.Brevity, others_.Brevity]"],
            ["named twice", "brevity (rewards_.Brevity), brevity (others_.Brevity)", "override `name`"],
        ),
    ],
)  # fmt: skip
def test_rewards_that_are_not_whole(words, parts, refused):
    message = refused({"rewards_.py": MODULE, "others_.py": MODULE}, "--rollout.rewards", *words)
    assert all(part in message for part in parts), message
