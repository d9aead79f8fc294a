"""functional/ is plain torch: it must not need, nor drag in, a trainer, a model library or numpy."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlif_lightning.functional

ROOM = Path(rlif_lightning.functional.__file__).parent
FILES = sorted(ROOM.rglob("*.py"))
ALLOWED = {"torch", *sys.stdlib_module_names}

BLOCKED_IMPORT = """
import sys

BLOCKED = {"lightning", "lightning_fabric", "pytorch_lightning", "transformers", "peft", "numpy"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Block())
from rlif_lightning.functional import advantages, aggregation, cast_linear, entropy, fused_loss, seeds, similarity
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
print("imported")
"""


def imported(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def allowed(name):
    return name.partition(".")[0] in ALLOWED or (name + ".").startswith("rlif_lightning.functional.")


def test_the_room_is_listed():
    listed = set(re.findall(r":mod:`(\w+)`", rlif_lightning.functional.__doc__)) - {"rlif_lightning"}
    assert listed == {f.stem for f in FILES} - {"__init__"} >= {"token_stats", "advantages", "losses"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_imports_torch_and_the_standard_library_only(file):
    assert [name for name in imported(file.read_text()) if not allowed(name)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import numpy as np",
        "from transformers import AutoModel",
        "import lightning.pytorch",
        "from rlif_lightning.rollout import Rollout",
        "from rlif_lightning.functionality import x",
        "from ..rollout import Rollout",
        "def f():\n    import peft",
    ],
)
def test_the_check_above_can_fail(line):
    assert [name for name in imported(line) if not allowed(name)]


def test_imports_where_everything_else_is_missing():
    command = [sys.executable, "-W", "ignore", "-c", BLOCKED_IMPORT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.strip() == "imported", run.stderr
