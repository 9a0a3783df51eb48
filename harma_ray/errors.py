"""The one exception that means: the user can mend this; finding it in what others made of it; parts of messages."""

import functools
import logging
import re
from collections.abc import Sequence


class UserError(ValueError):
    """A mistake or a condition that the user can mend.

    The message is one clear line that names the rule, the offending values and the way out; the command line prints
    it without a traceback and exits with status 2.
    """


class WorkerFailed(RuntimeError):
    """Workers of a training have ended that should not have.

    The message is one line: which, where, why, and where its log lies. The command line prints it with the way to go on
    (a note of the exception) and exits with status 1.
    """


class WorkerDied(WorkerFailed):
    """The process of a worker is gone, or its machine."""


def find_user_error(error: BaseException) -> UserError | None:
    """Returns the user's error that an exception is, was raised from, or tells of; None if there is none.

    Ray wraps what a task raises, at times as text alone.
    """
    waiting, seen = [error], set()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        inner = getattr(current, "cause", None)  # of Ray's errors: what the task raised
        if isinstance(current, UserError) and not isinstance(inner, BaseException):
            return current
        nearby = (inner, current.__cause__, current.__context__)
        waiting += [other for other in nearby if isinstance(other, BaseException)]
    told = re.findall(rf"^{re.escape(__name__)}\.UserError: (.+)$", str(error), re.MULTILINE)
    return UserError(told[-1]) if told else None


def count(number: float, what: str) -> str:
    """Returns a number of things for a message, such as ``1 epoch`` and ``2,000 epochs``; `what` is one of them."""
    if number != 1:
        is_ies = what.endswith("y") and what[-2] not in "aeou"
        what = f"{what[:-1]}ies" if is_ies else f"{what}{'es' if what.endswith('s') else 's'}"
    return f"{number:,.12g} {what}"


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """Returns names for a message, the first few if there are many."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


@functools.cache
def warn_once(logger: logging.Logger, text: str) -> None:
    """Logs a warning that several steps of a command would give, the first time alone."""
    logger.warning("%s", text)
