import argparse

import pytest
from command_line import refused

from harma_ray.cli import make_parser


def parsers(parser, words=()):
    """Yields the parsers of all commands with the words that lead there."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words, parser
    for name, inner in [item for group in groups for item in group.choices.items()]:
        yield from parsers(inner, (*words, name))


COMMANDS = dict(parsers(make_parser()))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_option_with_a_value_is_given_once_in_every_command(capsys, words):
    for action in COMMANDS[words]._actions:
        is_repeated = isinstance(action, argparse._AppendAction)
        if action.option_strings and action.nargs != 0 and not is_repeated:
            name, count = action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
            first, second = ([str((action.type or str)(value))] * count for value in list(action.choices or "78")[:2])
            error = refused(capsys, *words, name, *first, name, *second)
            assert f"`{name}` is given once, got `{' '.join(first)}` and `{' '.join(second)}`" in error


def test_a_data_set_more_has_a_way_out(capsys):
    error = refused(capsys, "train", "--recipe", "harma-scenes", "--data=a", "--data", "a b")
    assert error == (
        "error: `--data` is given once, got `a` and `'a b'`; leave one out, or run the command once for each data set"
    )


def test_what_may_be_repeated_is_repeated():
    parse = make_parser().parse_args
    assert parse(["generate", "--run", "x", "--image", "a", "--image", "b", "c=d"]).image == ["a", "b"]
    assert parse(["tune", "x", "--set", "a=1", "--set", "b=2", "--gpu", "--gpu"]).overrides == ["a=1", "b=2"]


TRAIN = ("train", "--recipe", "harma-scenes")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("trian",), "unknown command `trian`; did you mean `train`?"),
        (("convert", "foldr"), "unknown kind `foldr`; did you mean `folder`"),
        (("train", "--recpie", "x"), "launch.py train has no option `--recpie`; did you mean `--recipe`?"),
        (("evaluate", "-recipe", "x"), "launch.py evaluate has no option `-recipe`; did you mean `--recipe`?"),
        (("retrieve", "--xyzzy"), "launch.py retrieve has no option `--xyzzy`; see launch.py retrieve --help"),
        ((*TRAIN, "more"), "launch.py train does not take `more`; see launch.py train --help"),
        (("train", "--recipe", "harma-scene"), "unknown recipe `harma-scene`; did you mean `harma-scenes`?"),
        ((*TRAIN, "--set", "learning_rate=1"), "unknown key `learning_rate`; did you mean `optim.learning_rate`?"),
        (
            (*TRAIN, "--set", "seed=1", "--set", "seed=2"),
            "`seed` must have one value, got 1 from --set and 2 from --set",
        ),
        (
            (*TRAIN, "--set", "scaling.num_workers=1", "--workers", "2"),
            "`scaling.num_workers` must have one value, got 1 from --set and 2 from --workers; leave one out",
        ),
        (("train",), "one of the arguments --recipe --config --resume is required; see launch.py train --help"),
    ],
)
def test_mistyped_words_are_told_with_the_nearest(capsys, words, told):
    assert told in refused(capsys, *words)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (("optim.learning_rate=1e-3", "--data", "x"), "--set optim.learning_rate=1e-3 --data x"),
        (("learning_rate=1e-3", "epochs=2"), "--set optim.learning_rate=1e-3 --set train.epochs=2"),
        (("--set", "seed=1", "train.epochs=2"), "--set seed=1 --set train.epochs=2"),
        (("--optim.learning_rate", "1e-3", "--cpu"), "--set optim.learning_rate=1e-3 --cpu"),
        (("--learning-rate=1e-3",), "--set optim.learning_rate=1e-3"),
        (("--lr", "1e-3"), "--set optim.learning_rate=1e-3"),
        (("--data", "a=b", "adapter.widht=8"), "--data a=b --set adapter.width=8"),
    ],
)
def test_a_forgotten_set_is_told_with_the_right_command(capsys, given, right):
    command = f"launch.py train --recipe harma-scenes {right}"
    assert refused(capsys, *TRAIN, *given).endswith(f"did you mean: python {command}")


def test_a_setting_is_no_second_search_space(capsys):
    error = refused(capsys, "tune", "a space.yaml", "epochs=2")
    assert error.endswith("did you mean: python launch.py tune 'a space.yaml' --set train.epochs=2")
