"""The job takes any encoder, such as one of images alone."""

import io
import os
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from harma_ray.data.images import open_image
from harma_ray.errors import UserError, WorkerDied
from harma_ray.retrieval.encoding import Encoder, VectorIdentity
from harma_ray.vectors.job import Inputs, JobSettings, encode

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:.*use_(polars|push_based_shuffle|arrow_tensor_v2):DeprecationWarning"),
]
IDENTITY = {"backbone": "none", "pool": "mean"}


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def requests(pixels):
    files = []
    for array in pixels:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        files.append(buffer.getvalue())
    rows = [{"name": f"{number}", "label": f"image {number}"} for number in range(9)]
    opened = [partial(open_image, file) for file in files]
    return [partial(Inputs, rows[start : start + 2], opened[start : start + 2], ["a road"]) for start in range(0, 9, 2)]


def loader(encode_images):
    """Returns a function that loads an encoder; pickled whole, as no process but this knows the module."""
    values = dict(IDENTITY)

    def load(device):
        return Encoder(3, lambda image: torch.tensor(np.array(image)).movedim(2, 0), encode_images), VectorIdentity(
            values
        )

    return load


def test_two_processes_give_the_vectors_of_one_in_order(pixels, requests, ray_cluster):
    load = loader(lambda images: images.float().mean((2, 3)))
    found = list(encode(requests, load, JobSettings(2, num_actors=2), progress="means"))
    assert [row["name"] for part in found for row in part.rows] == list("012345678")
    vectors = np.concatenate([part.images for part in found])
    np.testing.assert_allclose(vectors, pixels.mean((1, 2)), rtol=1e-5)
    assert all(part.texts == {} for part in found)
    assert found[0].identity == VectorIdentity(IDENTITY)


def test_what_cannot_be_opened_is_left_out_as_far_as_it_may(requests, ray_cluster):
    load = loader(lambda images: images.float().mean((2, 3)))
    broken = partial(
        Inputs, [{"name": "x", "label": "image x"}, {"name": "y", "label": "image y"}], [partial(open_image, b"")] * 2
    )
    found = list(encode([broken, *requests], load, JobSettings(max_bad=2), progress="means"))
    assert (found[0].images.shape, found[0].rows) == ((0, 3), [])
    assert found[0].bad == ["image x: the file is empty", "image y: the file is empty"]
    with pytest.raises(
        UserError, match=r"^2 images cannot be read \(image x: .*empty; image y: .*\); mend them or not$"
    ):
        list(encode([*requests, broken], load, JobSettings(max_bad=1), progress="means", hint=" or not"))


def test_a_process_that_is_killed_ends_the_job_in_one_line(requests, ray_cluster, capfd):
    """Ray's own trace is not shown."""
    load = loader(lambda images: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkerDied, match=r"^a process that worked for this command died: killed \(SIGKILL\)[^\n]*$"):
        list(encode(requests, load, JobSettings(), progress="means"))
    printed = capfd.readouterr()
    assert not re.sub(r"means: .*", "", printed.out + printed.err).strip()


def test_identities_tell_by_what_they_differ():
    ours = VectorIdentity(IDENTITY)
    assert ours == VectorIdentity(dict(reversed(IDENTITY.items())))
    assert not ours.differing(VectorIdentity({**IDENTITY, "pool": "mean", "more": 1}))
    assert ours.differing(VectorIdentity({"pool": "cls"})) == "backbone, pool"
