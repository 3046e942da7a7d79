import pytest


def test_eight_examples_are_overfit(script, cache):
    end = script("debug_overfit.py", "--n", 8, "--data-dir", cache)
    assert end.status == 0, end.out
    assert end.out.startswith("overfit: 8 examples") and "sources named right 100%" in end.out


def test_the_obvious_version_does_not_learn_and_that_is_said(script, cache):
    end = script("debug_overfit.py", "--n", 8, "--data-dir", cache, "--steps", 3)
    assert end.status == 1 and end.out.startswith("NOT overfit: 8 examples, 3 steps")


@pytest.mark.parametrize(("args", "message"), [
    (("--n", 1), "'1' is not a whole number"),
    (("--n", 4, "--candidates", 5), "--candidates 5 is more than --n 4 has"),
    (("--data", "nowhere"), "no such folder"),
])  # fmt: skip
def test_bad_input(script, args, message):
    end = script("debug_overfit.py", *args)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1
