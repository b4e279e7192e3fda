"""The grammar of positions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope.errors import InputError
from qscope.steering.positions import Positions, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", Positions(True, True)),
        ("prompt", Positions(prompt=True)),
        ("generated", Positions(generated=True)),
        ("prompt,generated", Positions(True, True)),
        ("5", Positions(spans=((5, 5),))),
        ("3-7", Positions(spans=((3, 7),))),
        ("0,2,5-8", Positions(spans=((0, 0), (2, 2), (5, 8)))),
        (" generated , 0 - 3 ", Positions(generated=True, spans=((0, 3),))),
    ],
)
def test_grammar(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "column"),
    [("", 0), ("0,2,5-", 6), ("3-1", 2), ("al", 0), ("1,,2", 2), ("-3", 0), ("2 3", 1), ("1, x", 3), ("4-5-6", 3)],
)
def test_fault_is_marked(text, column):
    with pytest.raises(InputError) as caught:
        parse(text)
    line, mark = str(caught.value).splitlines()[1:3]
    assert line == f"  {text}"
    assert mark == " " * (column + 2) + "^"


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9)), min_size=1, max_size=5))
def test_every_list_of_spans_is_read_back(spans):
    text = ",".join(f"{a}-{a + n}" if n else str(a) for a, n in spans)
    assert parse(text).spans == tuple((a, a + n) for a, n in spans)


@given(st.text(alphabet="0123456789-, alpromt", max_size=12))
def test_anything_else_is_an_input_error(text):
    try:
        parse(text)
    except InputError as error:
        assert "^" in str(error)
