"""The one exception type that means: the user can mend this."""


class UserError(ValueError):
    """A mistake or a condition that the user can mend.

    The message is one clear line that names the rule, the offending values and the way out; the command line prints
    it without a traceback and exits with status 2.
    """
