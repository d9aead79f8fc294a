"""The house's plan: who imports whom. ``python tests/test_rooms.py`` prints the floors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "rlif_lightning").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")])
HEAVY = {"bitsandbytes", "datasets", "huggingface_hub", "jsonargparse", "math_verify", "matplotlib",
         "numpy", "pandas", "peft", "pyarrow", "shtab", "sympy", "tensorboard", "torch", "trackio",
         "transformers", "vllm"}  # fmt: skip
UNIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}  # Windows has none of them
UNIX_NAMES = {
    "os": {"fork", "forkpty", "getpgid", "getuid", "killpg", "mkfifo", "setsid", "uname", "wait3"},
    "signal": {"ITIMER_VIRTUAL", "SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2", "SIGVTALRM",
               "alarm", "pause", "setitimer", "sigwait"},
}  # fmt: skip
LINES, BODY, AT_ROOT, FLOORS = 300, 60, 7, 10


def module_of(file: Path) -> str:
    """``rlif_lightning.callbacks`` stands in callbacks/."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("rlif_lightning", *parts) if parts[0] == "callbacks" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}
PACKAGES = {name for name, file in MODULES.items() if file.name == "__init__.py"}


def room_of(module: str) -> str:
    """The first folder, or the file itself at the root."""
    return module.split(".")[1] if module.count(".") else module


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported: modules, or names within them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """The file of ours that a name comes from."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


TREES = {module: ast.parse(file.read_text()) for module, file in MODULES.items()}
GRAPH = {module: {o for n in imports(tree) if (o := own(n)) and o != module} for module, tree in TREES.items()}
# What a package's __init__ gathers comes from the files of its own folder, which import each other by their names.
BETWEEN = {m: {o for o in others if not (m in PACKAGES and o.startswith(m))} for m, others in GRAPH.items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The height of each node over what it imports.

    Raises:
        RecursionError: There is a circle; its nodes are named.
    """
    found: dict[str, int] = {}

    def height(node: str, path: tuple[str, ...]) -> int:
        if node in path:
            raise RecursionError(" -> ".join([*path[path.index(node) :], node]))
        if node not in found:
            found[node] = 1 + max((height(o, (*path, node)) for o in graph[node]), default=0)
        return found[node]

    for node in sorted(graph):
        height(node, ())
    return found


def rooms() -> dict[str, set[str]]:
    """Who imports whom, a room a node; the root's ``__init__`` names its offers for the user alone."""
    graph: dict[str, set[str]] = {}
    for module, others in GRAPH.items():
        if module != "rlif_lightning":
            room = room_of(module)
            graph.setdefault(room, set()).update({room_of(o) for o in others} - {room, "rlif_lightning"})
    return graph


def plan() -> str:
    """The floors, highest first."""
    by_floor: dict[int, list[str]] = {}
    for room, floor in floors(rooms()).items():
        by_floor.setdefault(floor, []).append(room if room in {room_of(p) for p in PACKAGES} else f"{room}.py")
    return "\n".join(f"{floor:>2}  {'  '.join(sorted(by_floor[floor]))}" for floor in sorted(by_floor, reverse=True))


def test_rooms_form_no_circle_and_few_floors():
    assert max(floors(rooms()).values()) <= FLOORS, plan()


def test_files_form_no_circle():
    floors({m: others - {"rlif_lightning"} for m, others in BETWEEN.items()})


def test_a_circle_is_found():
    with pytest.raises(RecursionError, match="a -> b -> a"):
        floors({"a": {"b"}, "b": {"a"}})


@pytest.mark.parametrize("module", MODULES)
def test_functions_import_heavy_libraries_only(module):
    functions = [n for n in ast.walk(TREES[module]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {name for function in functions for name in imports(function)}
    assert {n for n in inside if n.partition(".")[0] not in HEAVY | UNIX} == set()


def unguarded(tree: ast.AST) -> set[str]:
    """What Windows lacks and a file needs: imports at its top, and names in functions that ask for no system."""
    found: set[str] = set()

    def look(node: ast.AST, guarded: bool, top: bool) -> None:
        text = ast.unparse(node) if isinstance(node, ast.If | ast.Try | ast.FunctionDef) else ""
        guarded |= any(word in text for word in ("except ImportError", "hasattr(", "sys.platform"))
        if isinstance(node, ast.Import | ast.ImportFrom) and top and not guarded:
            found.update({name.partition(".")[0] for name in imports(node)} & UNIX)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and not guarded:
            found.update(f"{node.value.id}.{name}" for name in UNIX_NAMES.get(node.value.id, set()) & {node.attr})
        for child in ast.iter_child_nodes(node):
            look(child, guarded, top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    look(tree, False, True)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_windows_lacks_nothing_that_a_file_needs(module):
    """`import resource` at the top of one file kept the whole package from being imported there."""
    assert unguarded(TREES[module]) == set()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import resource", {"resource"}),
        ("from fcntl import flock", {"fcntl"}),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", set()),
        ("def f():\n    import resource", set()),
        ("import signal\nX = signal.SIGALRM", {"signal.SIGALRM"}),
        ("def f():\n    return signal.SIGPIPE", {"signal.SIGPIPE"}),
        ("def f():\n    if hasattr(signal, 'SIGVTALRM'):\n        signal.setitimer(1, 2)", set()),
        ("import signal\nsignal.signal(signal.SIGTERM, f)", set()),
    ],
)
def test_what_windows_lacks_is_found(code, found):
    assert unguarded(ast.parse(code)) == found


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= LINES
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert body[-1].end_lineno - body[0].lineno < BODY, node.name


def test_few_files_lie_at_the_root():
    assert len(list((ROOT / "rlif_lightning").glob("*.py"))) <= AT_ROOT


def test_the_documented_floors_are_these():
    assert plan() in (ROOT / "docs" / "architecture.md").read_text()


if __name__ == "__main__":
    print(plan())
