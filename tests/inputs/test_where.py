"""The comparison language against a small evaluator of its own, on every kind of column."""

import datetime as dt
import operator
import re
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_init.errors import InputError
from gpu_init.where import MAX_CHARACTERS, MAX_NESTING, parse

OPERATORS = {
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    "<>": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
BIG = 2**53


def arrow(values, kind):
    return pd.Series(values, dtype=pd.ArrowDtype(kind))


def taken(text, **columns):
    mask = parse(text).mask(pd.DataFrame(columns), "t.csv")
    assert mask.dtype == bool
    return mask.tolist()


# Conditions as trees, evaluated in three values, as SQL does: True, False, and None for unknown.


def literal_text(value):
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


values = st.one_of(st.integers(-3, 3), st.sampled_from([BIG, BIG + 1, -BIG - 1]))
comparisons = st.tuples(
    st.sampled_from(["a", "`b c`"]),
    st.sampled_from([*OPERATORS, "in", "not in"]),
    st.lists(values, min_size=1, max_size=3),
)
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3)),
    ),
    max_leaves=8,
)


def written(node, as_literal):
    if node[0] == "not":
        return f"not ({written(node[1], as_literal)})"
    if node[0] in ("and", "or"):
        return "(" + f" {node[0].upper()} ".join(written(part, as_literal) for part in node[1]) + ")"
    column, sign, literals = node
    if sign.endswith("in"):
        return f"{column} {sign} [{', '.join(map(as_literal, literals))}]"
    return f"{column}{sign}{as_literal(literals[0])}"


def truth(node, row):
    if node[0] == "not":
        inner = truth(node[1], row)
        return None if inner is None else not inner
    if node[0] in ("and", "or"):
        parts = [truth(part, row) for part in node[1]]
        decisive = node[0] == "or"
        return decisive if decisive in parts else None if None in parts else not decisive
    column, sign, literals = node
    value = row[column.strip("`")]
    if value is None:
        return None
    if sign.endswith("in"):
        return (value in literals) == (sign == "in")
    return OPERATORS[sign](value, literals[0])


def frames(rows):
    """The same rows as integers, nullable integers, and text."""
    columns = {name: [row[name] for row in rows] for name in ("a", "b c")}
    yield pd.DataFrame({name: arrow(column, pa.int64()) for name, column in columns.items()})
    yield pd.DataFrame({name: pd.Series(column, dtype="Int64") for name, column in columns.items()})
    texts = {name: [None if value is None else str(value) for value in column] for name, column in columns.items()}
    yield pd.DataFrame({name: arrow(column, pa.string()) for name, column in texts.items()})
    yield pd.DataFrame({name: pd.Series(column, dtype="object") for name, column in texts.items()})


@settings(deadline=None)
@given(conditions, st.lists(st.fixed_dictionaries({"a": st.none() | values, "b c": st.none() | values}), max_size=6))
def test_integers_agree_with_a_plain_evaluator(node, rows):
    expected = [truth(node, row) is True for row in rows]
    condition = parse(written(node, str))
    for frame in frames(rows):
        assert condition.mask(frame, "t").tolist() == expected


texts = st.text(st.sampled_from("ab'\" ä\U0001f600"), max_size=3)


@settings(deadline=None)
@given(
    st.sampled_from(list(OPERATORS)),
    texts,
    st.lists(st.none() | texts, max_size=6),
    st.sampled_from([pa.string(), pa.large_string()]),
)
def test_texts_compare_by_code_points(sign, literal, column, kind):
    expected = [value is not None and OPERATORS[sign](value, literal) for value in column]
    assert taken(f"c {sign} {literal_text(literal)}", c=arrow(column, kind)) == expected


numbers = st.decimals(-1000, 1000, places=2) | st.integers(-(10**25), 10**25).map(Decimal)


@settings(deadline=None)
@given(st.sampled_from(list(OPERATORS)), numbers, st.lists(st.none() | numbers, max_size=6))
def test_numbers_in_text_and_decimals_compare_exactly(sign, literal, column):
    expected = [value is not None and OPERATORS[sign](value, literal) for value in column]
    written = [None if value is None else f"{value:f}" for value in column]
    for series in (arrow(written, pa.string()), arrow(column, pa.decimal128(38, 2))):
        assert taken(f"c {sign} {literal:f}", c=series) == expected


@settings(deadline=None)
@given(st.sampled_from(list(OPERATORS)), st.integers(-(2**70), 2**70), st.integers(0, 9))
def test_integers_of_every_width_against_any_number(sign, whole, tenths):
    literal = Decimal(f"{whole}.{tenths}")
    for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.int64(), pa.uint64()):
        info = np.iinfo(kind.to_pandas_dtype())
        column = [info.min, 0, 1, info.max]
        expected = [OPERATORS[sign](Decimal(value), literal) for value in column]
        assert taken(f"c {sign} {literal:f}", c=arrow(column, kind)) == expected
        assert taken(f"c {sign} {literal:f}", c=pd.Series(column, dtype=kind.to_pandas_dtype())) == expected


def test_every_spelling_of_a_number_in_text():
    spelled = [
        "1",
        "1.0",
        "01",
        "1.",
        "0.1e1",
        "10E-1",
        "1" + "0" * 150 + "e-99",
        ".5",
        "-.5",
        "-0",
        "1.0000000000000000001",
    ]
    for column in (arrow(spelled, pa.string()), pd.Series(spelled, dtype="object"), pd.Series(spelled)):
        assert taken("c == 1", c=column) == [True] * 6 + [False] * 5
        assert taken("c > 1", c=column) == [False] * 6 + [True] + [False] * 3 + [True]
        assert taken("c in (0, 0.5)", c=column) == [False] * 7 + [True, False, True, False]
    for wrong in ("", " 1", "+1", "1e400", "nan", "inf", "0x1", "1_0", "\u0663", "9" * 400, "1\n"):
        with pytest.raises(InputError, match="row 1 is"):
            taken("c == 1", c=arrow(["1.5", wrong], pa.string()))


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("library", [np.dtype, lambda kind: pd.ArrowDtype(pa.from_numpy_dtype(kind))])
def test_floats_are_as_written_and_nan_is_missing(kind, library):
    column = pd.Series(np.array([0.1, np.nan, -2, np.inf], kind), dtype=library(kind))
    assert taken("c == 0.1", c=column) == [True, False, False, False]
    assert taken("c != 0.1", c=column) == [False, False, True, True]
    assert taken("not c >= 0", c=column) == [False, False, True, False]
    assert taken("c > 1" + "0" * 250, c=column) == [False, False, False, True]


def test_a_missing_value_satisfies_neither_a_comparison_nor_its_not():
    column = arrow([1, None], pa.int64())
    assert taken("c == 1", c=column) == [True, False]
    assert taken("not c == 1", c=column) == [False, False]
    assert taken("not not c == 1", c=column) == [True, False]
    assert taken("not (c == 2 and c == 3) or c == 9", c=column) == [True, False]
    assert taken("c == 1 or not c == true", c=arrow([None, None], pa.null())) == [False, False]


def test_words_in_any_case_and_either_side():
    column = arrow([0, 1, 2], pa.int64())
    assert taken("c=0 OR NOT c iN (1,\n0)", c=column) == [True, False, True]
    assert taken("1 < c", c=column) == [False, False, True]
    assert taken("c Not In [1]", c=column) == [True, False, True]
    assert taken("c == 0 or c == 1 and c == 2", c=column) == [True, False, False]  # `and` binds closer


def test_names_and_their_order():
    where = parse("`x:label` == 0 and user_id > 1 and `x:label` < 3 and `and` = 1 and é = 2")
    assert where.columns == ("x:label", "user_id", "and", "é")


TIMES = [dt.datetime(2024, 1, 31), None, dt.datetime(2024, 2, 1, 12, 0, 0, 500_000)]


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(TIMES),
        pd.Series(TIMES, dtype="datetime64[ns]"),
        pd.Series(TIMES).dt.tz_localize("UTC"),
        *(arrow(TIMES, pa.timestamp(unit)) for unit in ("ms", "us", "ns")),
        arrow([time and time.replace(tzinfo=dt.UTC) for time in TIMES], pa.timestamp("us", tz="Europe/Berlin")),
    ],
    ids=lambda column: str(column.dtype),
)
def test_times(column):
    assert taken("t == '2024-01-31'", t=column) == [True, False, False]
    assert taken("t > '2024-02-01 12:00:00.4'", t=column) == [False, False, True]
    assert taken("t >= '2024-02-01T14:00:00.5+02:00'", t=column) == [False, False, True]
    assert taken("t > '0001-01-01' and t < '9999-12-31'", t=column) == [True, False, True]
    with pytest.raises(InputError, match=r"t\.csv, column t holds times, but --where compares it with 'soon'"):
        taken("t < 'soon'", t=column)


def test_dates():
    column = arrow([dt.date(2024, 1, 31), None, dt.date(2024, 2, 1)], pa.date32())
    assert taken("t <= '2024-01-31 18:00'", t=column) == [True, False, False]
    assert taken("t == '2024-01-31 18:00'", t=column) == [False, False, False]


@pytest.mark.parametrize(
    "column",
    [arrow([True, None, False], pa.bool_()), arrow(["TRUE", None, "0"], pa.string()), pd.Series(["1", None, "False"])],
)
def test_booleans(column):
    assert taken("c == true", c=column) == [True, False, False]
    assert taken("c != True", c=column) == [False, False, True]
    assert taken("c in [true, false]", c=column) == [True, False, True]


def test_categories():
    column = arrow(pa.array(["1", None, "b"]).dictionary_encode(), pa.dictionary(pa.int32(), pa.string()))
    assert taken("c == 'b'", c=column) == [False, False, True]
    assert taken("c == 1", c=pd.Series([1, 2, 1], dtype="category")) == [True, False, True]


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        (
            arrow(["1", "2.5e0", None, "x"], pa.string()),
            "c > 1",
            "t.csv, column c: row 3 is 'x', but --where compares it with a number",
        ),
        (
            arrow(["1", "maybe"], pa.string()),
            "c == true",
            "t.csv, column c: row 1 is 'maybe', but --where compares it with true or",
        ),
        (
            arrow([1], pa.int8()),
            "c == '1'",
            "t.csv, column c holds numbers, but --where compares it with the text '1'; compare it with a",
        ),
        (arrow([1.5], pa.float32()), "c == true", "holds numbers, but --where compares it with true"),
        (arrow([True], pa.bool_()), "c == 1", "holds true and false, but --where compares it with the number 1"),
        (
            pd.Series(TIMES),
            "c == 1",
            "holds times, but --where compares it with the number 1; compare it with a time in quotes",
        ),
        (arrow([b"x"], pa.binary()), "c == 'x'", "holds values of type binary"),
    ],
)
def test_what_cannot_be_compared_is_named(column, text, message):
    with pytest.raises(InputError) as caught:
        taken(text, c=column)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_caller_names_the_rows():
    with pytest.raises(InputError, match="line 7 is 'x'"):
        parse("c == 1").mask(pd.DataFrame({"c": ["1", "x"]}), "t.csv", lambda at: f"line {at + 6}")


def test_the_mask_keeps_the_index_and_leaves_the_frame_alone():
    frame = pd.DataFrame({"c": arrow(["1", None, "3"], pa.string())}).set_axis([5, 5, 9])
    before = frame.copy()
    assert frame[parse("c > 0.5").mask(frame, "t")].index.tolist() == [5, 9]
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize(
    ("text", "found", "character", "expected"),
    [
        ("", "the end", 1, "a comparison"),
        ("x ==", "the end", 5, "a number, a text in quotes"),
        ("x == y", "'y'", 6, "a number, a text in quotes"),
        ("x === 1", "'='", 5, "a number"),
        ("(x == 1", "the end", 8, "and, or, or )"),
        ("x == 1)", "')'", 7, "and, or, or the end"),
        ("x in []", "']'", 7, "a number"),
        ("x in [1, 'a']", "\"'a'\"", 10, "one kind"),
        ("x in [1 2]", "'2'", 9, ", or ]"),
        ("x in (1]", "']'", 8, ", or )"),
        ("x not 1", "'1'", 7, "in"),
        ("a:b == 1", "':b == 1'", 2, "backquotes"),
        ("x == 'abc", '"\'abc"', 6, "a closing '"),
        ("x < true", "'true'", 5, "no order"),
        ("false >= x", "'false'", 1, "no order"),
        ("1 == 2", "'2'", 6, "the name of a column"),
        ("x == 1e5", "'1e5'", 6, "a literal"),
        ("x == 1 & y == 2", "'& y == 2'", 8, "a literal"),
        ("and == 1", "'and'", 1, "a comparison"),
        ("__import__('os')", "'('", 11, "=="),
    ],
)
def test_syntax_errors_name_the_place(text, found, character, expected):
    with pytest.raises(InputError) as caught:
        parse(text)
    message = str(caught.value)
    assert re.match(rf"--where: found {re.escape(found)} at character {character}, expected ", message), message
    assert expected in message
    assert "\n" not in message


def test_limits():
    deep = "(" * MAX_NESTING + "x == 1" + ")" * MAX_NESTING
    assert parse(deep).columns == ("x",)
    long = "not " * ((MAX_CHARACTERS - 6) // 4) + "x == 1"
    assert taken(long, x=pd.Series([1])) == [((MAX_CHARACTERS - 6) // 4) % 2 == 0]
    for text in (
        f"({deep})",
        "not(" * 60 + "x == 1" + ")" * 60,
        "x" * (MAX_CHARACTERS + 1),
        "x == " + "1" * 301,
        "x == '\udc80'",
    ):
        with pytest.raises(InputError):
            parse(text)


pieces = st.sampled_from(
    [*OPERATORS, "x", "`a b`", "1", "-.5", "'t'", "true", "and", "or", "not", "in", "(", ")", "[", "]", ",", "'", "\n"]
)


@settings(deadline=None)
@given(st.text(max_size=40) | st.lists(pieces, max_size=25).map(" ".join) | st.lists(pieces, max_size=25).map("".join))
def test_any_text_gives_a_condition_or_an_input_error(text):
    try:
        where = parse(text)
    except InputError as error:
        assert str(error).startswith("--where: ")
        assert len(str(error).splitlines()) == 1
        return
    frame = pd.DataFrame({name: arrow(["1", None, "0"], pa.string()) for name in where.columns})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(where.mask(frame, "t")) == 3
