"""The comparison language of ``--where``: which rows of a table to take.

::

    condition  = all { "or" all }
    all        = one { "and" one }
    one        = "not" one | "(" condition ")" | comparison
    comparison = column OP literal | literal OP column | column ["not"] "in" ( list in [] or () )
    OP         = "==" | "=" | "!=" | "<>" | "<" | "<=" | ">" | ">="
    literal    = 12 | -0.5 | 'text' | "text" | true | false

Words are taken in any case. A column is a name of letters, digits and ``_``, or anything in backquotes. A quote
inside quotes is written twice.

The literal decides how a column is read. A number: integers are compared exactly, decimal columns and numbers
written as text too, floats after the literal is rounded to the column's type. A text: text is compared by code
points, times (ISO 8601; without a zone, UTC) exactly. True or false: booleans, and the texts true, false, 1, 0.

A comparison with a missing value (null, NaN) is false, and ``not`` turns comparisons round (``not a < 1`` is
``a >= 1``), so a missing value satisfies neither a comparison nor its ``not``: the rows taken are those of SQL.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from gpu_init.errors import InputError
from gpu_init.ids import WHOLE_NUMBER, first_true, is_text

MAX_CHARACTERS = 4000
MAX_NESTING = 50
_MAX_DIGITS = 300  # every such number fits a float64

Literal = bool | Decimal | str
_Compare = Callable[[str, Any], Any]  # operator and literal to a boolean Series

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_SPELLED = {"=": "==", "<>": "!="}
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_WORDS = frozenset({"and", "or", "not", "in", "true", "false"})

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?![\w.]))
    | (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<quoted>`[^`]+`)
    | (?P<name>[^\W\d]\w*)
    | (?P<sign><>|[=!<>]=|[=<>()\[\],])
    | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_NUMBER_AS_TEXT = r"^-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9][0-9]?)?$"
_MAX_LENGTH = 200  # and two digits of exponent: such a number fits a float64 too

_KINDS = {
    "integer": r"u?int[0-9]",
    "float": r"float|double|halffloat",
    "decimal": r"decimal",
    "boolean": r"bool",
    "time": r"datetime64|timestamp|date32|date64",
    "category": r"category|dictionary",
}
_HOLDS = {"integer": "numbers", "float": "numbers", "decimal": "numbers", "boolean": "true and false", "time": "times"}
_COMPARED_WITH = {
    **dict.fromkeys(("integer", "float", "decimal"), "compare it with a number, without quotes"),
    "boolean": "compare it with true or false",
    "time": "compare it with a time in quotes, such as '2024-01-31'",
}

_A_LITERAL = "a number, a text in quotes, true or false"
_A_COMPARISON = "a comparison such as x_label == 0"
_A_TOKEN = "a literal, an operator or a name (in backquotes where it is not letters, digits and _)"


# The condition.


@dataclass(frozen=True)
class _Comparison:
    """Column OP values: with several, ``==`` means one of them and ``!=`` none of them."""

    column: str
    sign: str
    values: tuple[Literal, ...]


@dataclass(frozen=True)
class _Group:
    """All of the parts, or at least one of them."""

    every: bool
    parts: tuple[_Node, ...]


_Node = _Comparison | _Group


@dataclass(frozen=True)
class Where:
    """A condition on the rows of a table; `parse` makes it.

    Attributes
    ----------
    text : str
        As it was written.
    columns : tuple of str
        Names of the columns it looks at, in order of first use.
    """

    text: str
    columns: tuple[str, ...]
    _condition: _Node

    def mask(self, frame: Any, place: str, row: Callable[[int], str] = "row {}".format) -> Any:
        """Tell which rows satisfy the condition.

        Parameters
        ----------
        frame : pandas or cudf DataFrame, shape (n, ...)
            With all of `columns`; integers, floats, decimals, booleans, times, or everything as text.
        place : str
            What to call the table in an error, such as its file.
        row : callable, optional
            Names a position of the frame in an error, such as "line 12".

        Returns
        -------
        Series of bool, shape (n,)
            With the frame's index; no missing values.

        Raises
        ------
        InputError
            A column's type, or one of its values, cannot be compared with a literal.
        """
        return _evaluate(self._condition, lambda column: (frame[column], f"{place}, column {column}"), row)


def parse(text: str) -> Where:
    """Read a condition.

    Parameters
    ----------
    text : str
        At most 4,000 characters and 50 parentheses deep.

    Returns
    -------
    Where

    Raises
    ------
    InputError
        On one line: what was found, at which character (from 1), and what was expected.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"--where: {len(text)} characters; at most {MAX_CHARACTERS} are read.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("--where: not UTF-8 text.")
    condition = _Parser(text).condition()
    return Where(text, tuple(dict.fromkeys(_columns(condition))), condition)


def _columns(node: _Node) -> Iterator[str]:
    if isinstance(node, _Comparison):
        yield node.column
    else:
        for part in node.parts:
            yield from _columns(part)


def _negated(node: _Node) -> _Node:
    """De Morgan: ``not`` goes down to the comparisons, which turn round."""
    if isinstance(node, _Comparison):
        return _Comparison(node.column, _OPPOSITE[node.sign], node.values)
    return _Group(not node.every, tuple(map(_negated, node.parts)))


# Parsing.


@dataclass(frozen=True)
class _Token:
    kind: str  # number, text, quoted, name, word, sign or end
    text: str
    at: int


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None:
            rest = text[at:].lstrip()
            wanted = f"a closing {rest[0]}" if rest[0] in "'\"`" else _A_TOKEN
            raise _unexpected(_Token("wrong", rest, len(text) - len(rest)), wanted)
        kind = str(match.lastgroup)
        found = match[kind]
        word = kind == "name" and found.lower() in _WORDS
        yield _Token("word", found.lower(), match.start(kind)) if word else _Token(kind, found, match.start(kind))
        if kind == "end":
            return
        at = match.end()


def _unexpected(token: _Token, wanted: str) -> InputError:
    found = "the end" if token.kind == "end" else repr(token.text if len(token.text) <= 30 else token.text[:30] + "...")
    return InputError(f"--where: found {found} at character {token.at + 1}, expected {wanted}.")


class _Parser:
    """Recursive descent; only a parenthesis descends."""

    def __init__(self, text: str) -> None:
        self.tokens = list(_tokens(text))
        self.at = 0
        self.depth = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def take(self) -> _Token:
        token = self.token
        self.at += 1
        return token

    def taken(self, kind: str, *texts: str) -> bool:
        """Take the token if it is one of these."""
        found = self.token.kind == kind and self.token.text in texts
        self.at += found
        return found

    def condition(self) -> _Node:
        node = self.any()
        if self.token.kind != "end":
            raise _unexpected(self.token, "and, or, or the end")
        return node

    def any(self) -> _Node:
        return self.chain("or", lambda: self.chain("and", self.one))

    def chain(self, word: str, part: Callable[[], _Node]) -> _Node:
        parts = [part()]
        while self.taken("word", word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else _Group(word == "and", tuple(parts))

    def one(self) -> _Node:
        negate = False
        while self.taken("word", "not"):
            negate = not negate
        node = self.parenthesis() if self.token.text == "(" and self.token.kind == "sign" else self.comparison()
        return _negated(node) if negate else node

    def parenthesis(self) -> _Node:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise _unexpected(self.token, f"at most {MAX_NESTING} parentheses inside one another")
        self.take()
        node = self.any()
        if not self.taken("sign", ")"):
            raise _unexpected(self.token, "and, or, or )")
        self.depth -= 1
        return node

    def comparison(self) -> _Comparison:
        start = self.token
        if start.kind in ("name", "quoted"):
            column = self.column()
            negate = self.taken("word", "not")
            if self.taken("word", "in"):
                return _Comparison(column, "!=" if negate else "==", self.list())
            if negate:
                raise _unexpected(self.token, "in")
            sign = self.sign("==, !=, <, <=, >, >=, in or not in")
            value = self.literal(sign)
        elif self.is_literal():
            value = self.literal("==")
            sign = _MIRRORED[self.sign("==, !=, <, <=, > or >=")]
            if isinstance(value, bool):
                self.check_boolean(start, sign)
            column = self.column()
        else:
            raise _unexpected(start, _A_COMPARISON)
        return _Comparison(column, sign, (value,))

    def column(self) -> str:
        if self.token.kind not in ("name", "quoted"):
            raise _unexpected(self.token, "the name of a column (in backquotes where it is not letters, digits and _)")
        return self.take().text.strip("`")

    def sign(self, wanted: str) -> str:
        sign = _SPELLED.get(self.token.text, self.token.text)
        if self.token.kind != "sign" or sign not in _OPERATORS:
            raise _unexpected(self.token, wanted)
        self.take()
        return sign

    def is_literal(self) -> bool:
        token = self.token
        return token.kind in ("number", "text") or (token.kind == "word" and token.text in ("true", "false"))

    def literal(self, sign: str) -> Literal:
        if not self.is_literal():
            raise _unexpected(self.token, _A_LITERAL)
        token = self.take()
        if token.kind == "number":
            if len(token.text) > _MAX_DIGITS:
                raise _unexpected(token, f"a number of at most {_MAX_DIGITS} digits")
            return Decimal(token.text)
        if token.kind == "text":
            quote = token.text[0]
            return token.text[1:-1].replace(quote * 2, quote)
        self.check_boolean(token, sign)
        return token.text == "true"

    @staticmethod
    def check_boolean(token: _Token, sign: str) -> None:
        if sign not in ("==", "!="):
            raise _unexpected(token, f"a number or a text: true and false have no order ({sign})")

    def list(self) -> tuple[Literal, ...]:
        opening = self.token
        if not self.taken("sign", "[", "("):
            raise _unexpected(opening, "a list such as [0, 1]")
        closing = "]" if opening.text == "[" else ")"
        values = []
        while True:
            start = self.token
            values.append(self.literal("=="))
            if type(values[-1]) is not type(values[0]):
                raise _unexpected(start, "literals of one kind in a list: numbers, texts, or true and false")
            if self.taken("sign", closing):
                return tuple(values)
            if not self.taken("sign", ","):
                raise _unexpected(self.token, f", or {closing}")


# Evaluation, by methods that pandas and cudf share.


def _evaluate(node: _Node, column: Callable[[str], tuple[Any, str]], row: Callable[[int], str]) -> Any:
    if isinstance(node, _Comparison):
        return _compare(*column(node.column), node, row)
    parts = (_evaluate(part, column, row) for part in node.parts)
    return functools.reduce(operator.and_ if node.every else operator.or_, parts)


def _compare(column: Any, place: str, comparison: _Comparison, row: Callable[[int], str]) -> Any:
    missing = _missing(column)
    if bool(missing.all()):
        return ~missing
    literal = type(comparison.values[0])
    reader = _as_booleans if literal is bool else _as_numbers if literal is Decimal else _as_texts
    compare = reader(column, missing, place, row)
    if compare is None:
        kind, shown = kind_of(column), _shown(comparison.values[0])
        remedy = _COMPARED_WITH.get(kind, "it cannot be compared")
        raise InputError(f"{place} holds {_HOLDS.get(kind, kind)}, but --where compares it with {shown}; {remedy}.")
    found = (_flags(compare(comparison.sign, value)) for value in comparison.values)
    return functools.reduce(operator.or_ if comparison.sign == "==" else operator.and_, found) & ~missing


def _flags(series: Any) -> Any:
    """Booleans of whatever kind as plain ones; unknown is false."""
    return series.fillna(False).astype("bool")


def _missing(column: Any) -> Any:
    missing = _flags(column.isna())
    if kind_of(column) == "float":
        values = _floats(column)
        missing = missing | _flags(values != values)  # noqa: PLR0124 (NaN)
    return missing


def _floats(column: Any) -> Any:
    """Widen float16 of Arrow, which has no comparisons of it."""
    return column.astype("float32[pyarrow]") if str(column.dtype).startswith("halffloat") else column


def kind_of(column: Any) -> str:
    """Kind of a column's values, from the names that pandas, Arrow and cudf give types."""
    name = str(column.dtype).lower()
    if is_text(name):
        return "text"
    return next((kind for kind, pattern in _KINDS.items() if re.match(pattern, name)), f"values of type {name}")


def _shown(value: Literal) -> str:
    if isinstance(value, Decimal):
        return f"the number {value:f}"
    return f"the text {value!r}" if isinstance(value, str) else str(value).lower()


def _text(column: Any, missing: Any) -> Any:
    """Text of a column of text, categories or decimals; "0" where it is missing."""
    return (column if kind_of(column) == "text" else column.astype("str")).where(~missing, "0")


def _as_booleans(column: Any, missing: Any, place: str, row: Callable[[int], str]) -> _Compare | None:
    if kind_of(column) == "boolean":
        return lambda sign, value: _OPERATORS[sign](column, value)
    if kind_of(column) not in ("text", "category"):
        return None
    text = _text(column, missing)
    lowered = text.str.lower()
    true = _flags(lowered.isin(["true", "1"]))
    wrong = ~(true | _flags(lowered.isin(["false", "0"])))
    _refuse(text, wrong, place, row, "but --where compares it with true or false (1 or 0)")
    return lambda sign, value: _OPERATORS[sign](true, value)


def _as_numbers(column: Any, missing: Any, place: str, row: Callable[[int], str]) -> _Compare | None:
    match kind_of(column):
        case "integer":
            return lambda sign, value: _compare_integers(column, sign, value)
        case "float":
            values = _floats(column)
            return lambda sign, value: _OPERATORS[sign](values, _rounded(value, str(column.dtype)))
        case "decimal" | "text" | "category":
            return _numbers_in_text(_text(column, missing), place, row)
    return None


def _as_texts(column: Any, missing: Any, place: str, row: Callable[[int], str]) -> _Compare | None:  # noqa: ARG001
    match kind_of(column):
        case "text" | "category":
            text = _text(column, missing)
            return lambda sign, value: _OPERATORS[sign](text, value)
        case "time":
            counts, per_day = time_counts(column)
            return lambda sign, value: _compare_integers(counts, sign, _days(value, place) * per_day)
    return None


def _refuse(text: Any, wrong: Any, place: str, row: Callable[[int], str], why: str) -> None:
    if bool(wrong.any()):
        at = first_true(wrong)
        value = str(text.iloc[at])
        shown = repr(value if len(value) <= 60 else value[:60] + "...")
        raise InputError(f"{place}: {row(at)} is {shown}, {why}.")


def _compare_integers(column: Any, sign: str, value: Decimal | Fraction) -> Any:
    """Compare integers with any number, exactly: a bound between two integers becomes one of them."""
    bound = math.ceil(value) if sign in ("<", ">=") else math.floor(value)
    limits = np.iinfo(np.uint64 if str(column.dtype).lower().startswith("uint") else np.int64)
    top = limits.dtype.type(limits.max)
    if sign in ("==", "!=") and bound != value:
        always: bool | None = sign == "!="
    elif bound > limits.max:
        always = sign in ("<", "<=", "!=")
    elif bound < limits.min:
        always = sign in (">", ">=", "!=")
    else:
        return _OPERATORS[sign](column, limits.dtype.type(bound))
    return column <= top if always else column > top


def _rounded(value: Decimal, kind: str) -> Any:
    """Round a literal to a type of floats; to float64 where it does not fit."""
    arrow = {"double": "float64", "float": "float32", "halffloat": "float16"}
    name = kind.lower().removesuffix("[pyarrow]")
    with np.errstate(over="ignore"):
        rounded = np.dtype(arrow.get(name, name)).type(value)
    if not np.isfinite(rounded):
        return np.float64(value)
    return np.float32(rounded) if rounded.dtype == np.float16 else rounded


def _numbers_in_text(text: Any, place: str, row: Callable[[int], str]) -> _Compare:
    """Compare numbers written as text: as int64 where they fit, else as floats, and as decimals where those tie."""
    whole = _flags(text.str.match(WHOLE_NUMBER))
    number = whole | (_flags(text.str.match(_NUMBER_AS_TEXT)) & _flags(text.str.len() <= _MAX_LENGTH))
    why = "but --where compares it with a number; put that in quotes to compare texts"
    _refuse(text, ~number, place, row, why)
    arrow = "[pyarrow]" if "pyarrow" in str(text.dtype) else ""
    integers = text.where(whole, "0").astype(f"int64{arrow}")
    if bool(whole.all()):
        return functools.partial(_compare_integers, integers)
    floats = text.where(~whole, "0").astype(f"double{arrow}")

    def compare(sign: str, value: Decimal) -> Any:
        # Rounding keeps the order, so only a number that rounds to the literal's float can be misjudged.
        ties = _flags(floats == float(value)) & ~whole
        accepted = [one for one in text[ties].drop_duplicates().to_numpy() if _OPERATORS[sign](Decimal(one), value)]
        others = _flags(_OPERATORS[sign](floats, float(value))) & ~ties
        if accepted:
            others = others | _flags(text.isin(accepted))
        return (_flags(_compare_integers(integers, sign, value)) & whole) | (others & ~whole)

    return compare


def time_counts(column: Any) -> tuple[Any, int]:
    """Count times as integers, and say how many of them make a day."""
    kind = str(column.dtype)
    if kind.startswith("date32"):
        return column.astype("int32[pyarrow]"), 1
    unit = re.search(r"\[(s|ms|us|ns)\b", kind)
    seconds = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit[1] if unit else "ns"]
    return column.astype("int64[pyarrow]" if "pyarrow" in kind else "int64"), seconds * 86_400


def _days(text: str, place: str) -> Fraction:
    """Days since 1970 of an ISO 8601 date or time."""
    try:
        if re.search(r"\.[0-9]{7}", text):
            raise ValueError
        time = datetime.fromisoformat(text)
        since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError):
        remedy = "write '2024-01-31' or '2024-01-31 18:00'"
        raise InputError(f"{place} holds times, but --where compares it with {text[:40]!r}; {remedy}.") from None
    return Fraction(since // timedelta(microseconds=1), 86_400 * 10**6)
