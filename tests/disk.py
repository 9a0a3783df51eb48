"""A disk that is full."""

import contextlib
import resource


@contextlib.contextmanager
def file_size_limit(limit):
    """Lets this process write no file of more bytes, which fails as on a full disk; Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
