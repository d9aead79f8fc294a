"""The names of all settings, read from the sources of the classes that have them: nothing heavy is imported."""

import ast
from importlib.util import find_spec
from pathlib import Path

OURS = "rlif_lightning"
CLASSES = {  # group of settings: package, file in it, class
    "trainer": ("lightning", "pytorch/trainer/trainer.py", "Trainer"),
    "model": (f"{OURS}.training", "module.py", "RLIFModule"),
    "data": (f"{OURS}.data", "module.py", "PromptDataModule"),
    "memory_check": (f"{OURS}.callbacks", "memory_check.py", "MemoryCheck"),
    "rollout": (f"{OURS}.callbacks", "rollout.py", "RolloutCallback"),
    "evaluation": (f"{OURS}.callbacks", "evaluation.py", "Evaluation"),
    "guard": (f"{OURS}.callbacks", "guard.py", "CollapseGuard"),
    "completions": (f"{OURS}.callbacks", "completions.py", "Completions"),
    "checkpoint": (f"{OURS}.callbacks", "checkpoint.py", "RolloutCheckpoint"),
}
OTHERS = ("config", "seed_everything", "runs", "ckpt_path", "help", "print_config")


def setting_names() -> list[str]:
    """Of every setting, such as ``model.name``; those of the classes that settings name are not among them."""
    named = (f"{group}.{name}" for group, (package, file, cls) in CLASSES.items() for name in _of(package, file, cls))
    return [*OTHERS, *named]


def _of(package: str, file: str, cls: str) -> list[str]:
    """The arguments of a class."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
    init = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return [argument.arg for argument in (*init.args.args[1:], *init.args.kwonlyargs)]
