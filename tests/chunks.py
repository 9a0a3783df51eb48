"""Rankings in chunks of another size."""

from contextlib import contextmanager

import pytest

from harma_ray.retrieval import ranking


@contextmanager
def scores_at_a_time(count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_SCORES_PER_CHUNK", count or ranking._SCORES_PER_CHUNK)
        yield
