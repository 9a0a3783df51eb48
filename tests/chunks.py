"""Rankings in chunks of another size, of a gallery that is read in blocks as a large one is."""

from contextlib import contextmanager

import pytest

from harma_ray.retrieval import ranking


@contextmanager
def scores_at_a_time(count):
    with pytest.MonkeyPatch.context() as patch:
        if count:
            patch.setattr(ranking, "_SCORES_PER_CHUNK", count)
            patch.setattr(ranking, "_SCORES_PER_PASS", 3 * count)
            patch.setattr(ranking, "_NUMBERS_KEPT", 0)
            patch.setattr(ranking, "_NUMBERS_PER_BLOCK", 70)
        yield
