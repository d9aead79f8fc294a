"""The one exception for a user's mistake."""

import math
import re
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """A mistake that its message can mend; the command line shows it without a traceback.

    Args:
        wrong: What is wrong, one sentence.
        got: What was given.
        expected: What would have been right.
        do: What to do about it.
    """

    def __init__(self, wrong: str, *, got: object = None, expected: object = None, do: object = None) -> None:
        lines = [wrong]
        facts = (("got", got), ("expected", expected), ("do", do))
        lines += [f"  {name}: {text}" for name, text in facts if text is not None]
        super().__init__("\n".join(lines))


def check_ranges(section: str, *settings: tuple[str, object, object, str]) -> None:
    """Refuse the first setting of a section (name, value, whether it is right, what would be) that is wrong.

    Raises:
        UserError: It is out of range, or not finite.
    """
    for name, value, right, expected in settings:
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{section}.{name} is out of range", got=value, expected=expected)


def check_finite(value: Any, name: str = "") -> None:
    """Refuse NaN and infinity anywhere in settings: mappings and lists of them, by their names.

    Raises:
        UserError: The first one that is found.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name.replace('.init_args', '')} is no finite number", got=value)
    parts = value.items() if hasattr(value, "items") else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        check_finite(part, f"{name}.{key}".removeprefix("."))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it: libraries between us and the command line wrap them."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def users_mistake(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an exception."""
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)


DISTRIBUTED = ("DistBackendError", "DistNetworkError", "DistStoreError")
LOST = "reset by peer|closed by peer|Broken pipe|Timed out|Socket Timeout|communicator was aborted|process exited"


def lost_process(error: BaseException | None) -> UserError | None:
    """What to say where another process of the run has gone: gloo and NCCL only report a lost connection."""
    for cause in causes(error):
        said = str(cause)
        if ("gloo" in said or type(cause).__name__ in DISTRIBUTED) and re.search(LOST, said):
            return UserError(
                "Another process of this run has ended or does not answer, so this one ends as well",
                got=said.splitlines()[0][:200],
                do="look for the first error among the processes' messages; continue with --ckpt_path last",
            )
    return None
