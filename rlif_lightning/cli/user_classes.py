"""What a recipe's classes raise when they are imported or made, reported with setting, file and line."""

from typing import Any

from jsonargparse import Namespace

from rlif_lightning.errors import UserError, missing_package, place_of, said_by_python
from rlif_lightning.runs.signals import Stopped


def is_users(error: BaseException) -> bool:
    """Whether an exception is that of a user's code: also one that ends a program, but for signals and Ctrl-C."""
    return isinstance(error, Exception) or not (isinstance(error, Stopped | KeyboardInterrupt) or not place_of(error))


def failure(setting: str, what: str, happens: str, error: BaseException) -> tuple[str, str]:
    """What is wrong with the class of a setting, and what to do."""
    if package := missing_package(error):
        wrong = f"{setting}: {what} needs {package}, which is not installed{place_of(error)}"
        return wrong, f"pip install {package}"
    return f"{setting}: {what} can't be {happens}: {said_by_python(error)}", "correct its settings or its code"


class ClassMaker:
    """Makes the objects of settings for jsonargparse; keeps the first mistake, as unions try other types after it."""

    def __init__(self, config: Namespace) -> None:
        self.config = config
        self.mistake: UserError | None = None

    def __call__(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        """An object of the class."""
        try:
            return cls(*args, **kwargs)
        except UserError as error:
            self.mistake = self.mistake or error
            raise
        except BaseException as error:
            inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None  # no wrong argument
            if (inside and cls.__module__.startswith("rlif_lightning.")) or not is_users(error):
                raise
            setting = setting_of(self.config, cls.__name__) or cls.__module__
            wrong, do = failure(setting, cls.__name__, "made", error)
            self.mistake = self.mistake or UserError(wrong, do=do)
            raise self.mistake from error


def setting_of(settings: Any, name: str, key: str = "") -> str | None:
    """The setting that names a class; None where none does."""
    if isinstance(settings, list):
        return next(filter(None, (setting_of(item, name, key) for item in settings)), None)
    if not isinstance(settings, Namespace):
        return None
    if str(settings.get("class_path")).rpartition(".")[2] == name:
        return key.replace(".init_args", "")
    pairs = vars(settings).items()
    return next(filter(None, (setting_of(value, name, f"{key}.{own}".strip(".")) for own, value in pairs)), None)
