"""The user's error is found in whatever wraps it."""

import pytest

from harma_ray.errors import UserError, count, find_user_error


def raised(function):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.value


def test_a_users_error_is_found_under_its_wrappers():
    def wrap():
        try:
            raise UserError("row 3: too large")
        except UserError as error:
            raise RuntimeError("worker failed") from error

    assert str(find_user_error(raised(wrap))) == "row 3: too large"


def test_a_users_error_is_found_where_another_error_hid_it():
    def hide():
        try:
            raise UserError("the disk is full")
        finally:
            raise OSError("again")

    assert str(find_user_error(raised(hide))) == "the disk is full"


def test_a_users_error_is_found_in_a_trace():
    trace = "Traceback (most recent call last):\n  ...\nharma_ray.errors.UserError: use 4 or 6\n"
    assert str(find_user_error(RuntimeError(trace))) == "use 4 or 6"


def test_other_errors_are_not_the_users():
    assert find_user_error(RuntimeError("harma_ray.errors.UserError is a class")) is None
    assert find_user_error(ValueError("no")) is None


@pytest.mark.parametrize(
    ("number", "what", "text"),
    [
        (1, "epoch", "1 epoch"),
        (2000, "epoch", "2,000 epochs"),
        (0, "query", "0 queries"),
        (2, "key", "2 keys"),
        (16, "class", "16 classes"),
        (1.5, "hour", "1.5 hours"),
    ],
)
def test_one_thing_is_told_in_the_singular(number, what, text):
    assert count(number, what) == text


@pytest.mark.ray
def test_a_users_error_of_a_ray_task_is_found_bare(ray_cluster):
    import ray

    @ray.remote
    def fail():
        raise UserError("cannot read shard 7")

    error = raised(lambda: ray.get(fail.remote()))
    assert str(find_user_error(error)) == "cannot read shard 7"
