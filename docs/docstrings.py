"""What docs/mkdocs.yml needs to read the package's docstrings: an extension of griffe."""

import re
from typing import Any

from griffe import Extension, GriffeLoader, Module, Object


class House(Extension):
    """``callbacks/`` stands at the top of the repository; names in docstrings have Sphinx's roles."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **others: Any) -> None:
        """Put the callbacks where they are imported from."""
        if pkg.name == "rlif_lightning" and "callbacks" not in pkg.members:
            pkg.set_member("callbacks", loader.load("callbacks"))

    def on_instance(self, *, obj: Object, **others: Any) -> None:
        """Show :class:`Rollout` as code."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", obj.docstring.value)
