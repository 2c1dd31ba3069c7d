"""key=value arguments."""

from __future__ import annotations

import pytest

from library.errors import OptionError
from library.training.literals import parse_literals, refuse_unknown


def test_values_are_python_literals():
    pairs = ["betas=(0.9,0.99)", "weight_decay=1e-2", "fused=True", "eps=None", "rules='a=b'", "betas2=0.9,0.99"]
    assert parse_literals(pairs, "--optimizer_args") == {
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "fused": True,
        "eps": None,
        "rules": "a=b",  # split at the first equals sign alone
        "betas2": (0.9, 0.99),
    }


@pytest.mark.parametrize("nothing", [None, (), []])
def test_no_arguments_are_an_empty_mapping(nothing):
    assert parse_literals(nothing, "--optimizer_args") == {}


@pytest.mark.parametrize(
    ("pair", "advice"),
    [
        ("decouple=true", 'Did you mean "decouple=True"?'),
        ("decay_type=linear", "Did you mean \"decay_type='linear'\"?"),
    ],
)
def test_a_bare_word_is_refused_with_what_was_meant(pair, advice):
    with pytest.raises(OptionError) as caught:
        parse_literals([pair], "--optimizer_args")
    assert str(caught.value).endswith(advice)


@pytest.mark.parametrize("pair", ["weight_decay", "=1", "2x=1", "betas=(0.9", "eps="])
def test_what_is_no_key_and_literal_is_refused_by_name(pair):
    with pytest.raises(OptionError) as caught:
        parse_literals([pair], "--optimizer_args")
    assert str(caught.value).startswith(f"--optimizer_args {pair}: ")


def test_a_key_given_twice_is_refused():
    with pytest.raises(OptionError, match="gives eps twice"):
        parse_literals(["eps=1", "eps=2"], "--optimizer_args")


def test_an_unknown_argument_lists_the_known_and_the_nearest():
    with pytest.raises(OptionError, match=r"--optimizer_args beta: AdamW takes betas, eps\. Did you mean betas\?"):
        refuse_unknown({"beta": 1}, ["eps", "betas"], "--optimizer_args", "AdamW")
