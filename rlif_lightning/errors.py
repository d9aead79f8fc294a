"""The one exception for a user's mistake."""


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
