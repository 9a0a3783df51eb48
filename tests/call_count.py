"""How much work Python does, counted: a measure that no busy machine moves."""

import sys


def num_calls(function, *arguments, **named):
    """Calls a function and returns how many functions were called meanwhile, built-in ones too."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function(*arguments, **named)
    finally:
        sys.setprofile(before)
    return calls
