"""What a command ends with where a user, a disk or another process is to blame, and what other exceptions say."""

import difflib
import errno
import math
import os
import re
import shutil
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """A text in which what would act on a terminal (control characters, changes of direction) is shown by its number.

    Line ends and tabs stay; of JSON the result is JSON of the same value.
    """
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class UserError(Exception):
    """A mistake that its message can mend; the command line shows it without a traceback.

    Args:
        wrong: What is wrong, one sentence.
        got: What was given.
        expected: What would have been right.
        do: What to do about it.
    """

    code = 2  # what the command exits with

    def __init__(self, wrong: str, *, got: object = None, expected: object = None, do: object = None) -> None:
        lines = [wrong]
        facts = (("got", got), ("expected", expected), ("do", do))
        lines += [f"  {name}: {text}" for name, text in facts if text is not None]
        super().__init__(escaped("\n".join(lines)))


class Failure(UserError):
    """Something that the machine did, not the user."""

    code = 1


def did_you_mean(
    word: str, known: Iterable[str], form: Callable[[str], str] = str, cutoff: float = 0.6
) -> str | None:
    """A question that names the most similar of some names, as ``form`` writes it; None where none is similar."""
    near = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f"did you mean {form(near[0])}?" if near else None


def check_ranges(section: str, *settings: tuple[str, object, object, str]) -> None:
    """Refuse the first wrong setting of a section: name, value, whether it is right, what would be. NaN never is."""
    for name, value, right, expected in settings:
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{section}.{name} is out of range".lstrip("."), got=value, expected=expected)


def check_numbers(value: Any, name: str = "") -> None:
    """Refuse NaN, infinity and what no machine word holds anywhere in settings: mappings and lists of them."""
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= 2**63):
        expected = "a finite number of at most 64 bits"
        raise UserError(f"{name} is out of range", got=str(value)[:80], expected=expected)
    for part in value if isinstance(value, list | tuple) else ():
        check_numbers(part, name)
    for key, part in value.items() if hasattr(value, "items") else ():
        check_numbers(part, f"{name}.{key}".removeprefix(".").replace(".init_args", ""))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it: libraries between us and the command line wrap them."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def users_mistake(error: BaseException | None) -> UserError | None:
    """The user's mistake behind an exception."""
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)


def missing_package(error: BaseException) -> str | None:
    """The package for want of which something can't be imported, by the name that it is imported or installed by."""
    if not isinstance(error, ImportError):
        return None
    asked = re.search(r"pip install (?:-\S+ )*['\"]?([\w.-]+)", str(error))
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return missing or (asked[1] if asked else None)


def said_by_python(error: BaseException) -> str:
    """Type and message of an exception that came out of somebody else's code, and where."""
    text = " ".join([f"{type(error).__name__}:", *str(error).split()])
    return textwrap.shorten(text, 300, placeholder=" ...") + place_of(error)


def place_of(error: BaseException) -> str:
    """File and line from which an exception comes, the last ones outside of libraries and of this package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not re.match(LIBRARY, f.filename)]
    return f" ({frames[-1].filename.removeprefix(os.getcwd() + os.sep)}, line {frames[-1].lineno})" if frames else ""


HOMES = [re.escape(os.path.dirname(file) + os.sep) for file in (__file__, os.__file__)]
LIBRARY = f"<|.*[/\\\\](site|dist)-packages[/\\\\]|{'|'.join(HOMES)}"
DISTRIBUTED = ("DistBackendError", "DistNetworkError", "DistStoreError")
LOST = "reset by peer|closed by peer|Broken pipe|Timed out|Socket Timeout|communicator was aborted|process exited"


def lost_process(error: BaseException | None) -> Failure | None:
    """What to say where another process of the run has gone: gloo and NCCL only report a lost connection."""
    for cause in causes(error):
        said = str(cause)
        if ("gloo" in said or type(cause).__name__ in DISTRIBUTED) and re.search(LOST, said):
            return Failure(
                "Another process of this run has ended or does not answer, so this one ends as well",
                got=said.splitlines()[0][:200],
                do="look for the first error among the processes' messages; continue with --ckpt_path last",
            )
    return None


FULL = "out of memory|(can't allocate|not enough) memory|size calculation overflowed|multiplication overflow"
LESS_MEMORY = (
    "lower --rollout.micro_batch_size, --rollout.sampler.rows or --rollout.max_new_tokens, or set "
    "--model.gradient_checkpointing true, --model.lora or --model.quantization nf4: rlif plan says what each saves"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's or this machine's, for which torch has no type of its own."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(FULL, str(error))))


def out_of_memory(error: BaseException | None) -> UserError | None:
    """What to say when memory runs out at any time."""
    for cause in filter(is_out_of_memory, causes(error)):
        got = str(cause).partition("\n")[0] or type(cause).__name__
        return UserError("The device's memory ran out", got=got, do=LESS_MEMORY)
    return None


DISK = {  # what a system's error means, and what to do
    errno.ENOSPC: ("There is no room for {}", "make room"),
    errno.EDQUOT: ("The quota leaves no room for {}", "make room"),
    errno.EFBIG: ("The disk takes no file as large as {}", "give another folder"),
    errno.EROFS: ("The disk is read-only and does not take {}", "mount it for writing again, or give another folder"),
    errno.EIO: ("The disk has failed to write {}", "look at the system's log for this disk, or give another folder"),
}
SAFE = "what was written before is whole"


class DiskFailure(Failure):
    """A disk that is full, read-only or broken, or a file that others have touched.

    Args:
        path: The file or folder that could not be written.
        number: The system's error.
        safe: What is not lost.
    """

    def __init__(self, path: object, number: int, safe: str = SAFE) -> None:
        self.path, self.number = path, number
        what, do = DISK.get(number, ("{} can't be written", "look who else has moved, removed or replaced it"))
        super().__init__(what.format(path), got=f"{os.strerror(number)}{_free(str(path))}", do=f"{do}; {safe}")


def _free(path: str) -> str:
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    try:
        return f"; {shutil.disk_usage(path or '.').free / 2**20:.1f} MB are free"
    except OSError:
        return ""


def disk_failure(error: BaseException | None, path: object = None) -> DiskFailure | None:
    """What to say where a disk does not take a file, of which ``path`` is the name if the error does not say it.

    torch's writer reports only where it stopped, that of safetensors the number of the system's error in a text.
    """
    found = list(causes(error))
    for cause in found:
        if isinstance(cause, DiskFailure):
            return cause
        said = re.search(r"\(os error (\d+)\)", str(cause))
        number = cause.errno if isinstance(cause, OSError) else int(said[1]) if said else None
        if number in DISK:
            return DiskFailure(path or getattr(cause, "filename", None) or "the output folder", number)
    if any(re.search("PytorchStreamWriter failed|unexpected pos", str(cause)) for cause in found):
        return DiskFailure(path or "the output folder", errno.ENOSPC)
    return None


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Name the file or folder which a disk has not taken, by a DiskFailure."""
    try:
        yield
    except Exception as error:
        failure = disk_failure(error, path)
        if failure is None or failure is error:
            raise
        raise failure from error


def known_failure(error: BaseException) -> UserError | None:
    """What the command line says in place of a traceback; None where the program is to blame."""
    return users_mistake(error) or lost_process(error) or disk_failure(error) or out_of_memory(error)
