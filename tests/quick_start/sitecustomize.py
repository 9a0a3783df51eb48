"""Read by every Python that the tests start: the half million objects of its imports are not searched for garbage."""

import gc

gc.set_threshold(50_000)
