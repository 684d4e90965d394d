"""The comparison language of ``--where``, which says which rows of a table to take.

::

    condition  = all { "or" all }
    all        = one { "and" one }
    one        = "not" one | "(" condition ")" | comparison
    comparison = column OP literal | literal OP column | column ["not"] "in" ( list in [] or () )
    OP         = "==" | "=" | "!=" | "<>" | "<" | "<=" | ">" | ">="
    literal    = 12 | -0.5 | 'text' | "text" | true | false

Upper and lower case make no difference in the words of the language. A column is a name of letters, digits and
``_``, or anything in backquotes. To put a quote inside a quoted text, write it twice.

The kind of the literal decides how the values of the column are read:

- A number. Integers, decimal columns and numbers that are written as text are compared exactly. For a column of
  floats, the literal is first rounded to the column's type.
- A text. Text is compared by code points. Times (ISO 8601; in UTC, where no zone is given) are compared exactly.
- True or false. The column holds booleans, or the texts true, false, 1 and 0.

A comparison with a missing value (null or NaN) is false. ``not`` inverts the comparisons inside it (``not a < 1``
is ``a >= 1``), so a missing value satisfies neither a comparison nor its ``not``: SQL takes the same rows.
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
from typing import Any, NamedTuple

import numpy as np

from gpu_init.errors import InputError
from gpu_init.ids import WHOLE_NUMBER, first_true, is_text, shown

MAX_CHARACTERS = 4000
MAX_NESTING = 50
_MAX_DIGITS = 300  # Every number of at most so many digits fits a float64.

Literal = bool | Decimal | str
_Compare = Callable[[str, Any], Any]  # It takes an operator and a literal, and returns a Series of booleans.

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_SYNONYMS = {"=": "==", "<>": "!="}
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?![\w.]))
    | (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<boolean>(?ai:true|false)\b)
    | (?P<sign><>|[=!<>]=|[=<>()\[\],]|(?ai:and|or|not|in)\b)
    | (?P<column>`[^`]+`|[^\W\d]\w*)
    | (?P<wrong>.+)
    | (?P<end>\Z)
    )""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER_AS_TEXT = r"^-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9][0-9]?)?$"
_MAX_LENGTH = 200  # A number as text of at most so many characters, with two digits of exponent, fits a float64.

_KINDS = {
    "integer": r"u?int[0-9]",
    "float": r"float|double|halffloat",
    "decimal": r"decimal",
    "boolean": r"bool",
    "time": r"datetime64|timestamp|date32|date64",
    "category": r"category|dictionary",
}
# For each kind of column: what an error says that it holds, and what it can be compared with.
_MISMATCH = {
    **dict.fromkeys(("integer", "float", "decimal"), ("numbers", "compare it with a number, without quotes")),
    "boolean": ("true and false", "compare it with true or false"),
    "time": ("times", "compare it with a time in quotes, such as '2024-01-31'"),
}

# A condition takes the arguments of `Where.mask` and returns a Series of booleans.
_Condition = Callable[[Any, str, Callable[[int], str]], Any]


@dataclass(frozen=True)
class Where:
    """A condition on the rows of a table; `parse` makes it.

    Attributes
    ----------
    text : str
        The condition as the user wrote it.
    columns : tuple of str
        Names of the columns that it looks at, in order of first use.
    """

    text: str
    columns: tuple[str, ...]
    _condition: _Condition

    def mask(self, frame: Any, place: str, row: Callable[[int], str] = "row {}".format) -> Any:
        """Tell which rows satisfy the condition.

        Parameters
        ----------
        frame : pandas or cudf DataFrame, shape (n, ...)
            It has all of `columns`, as integers, floats, decimals, booleans, times, categories or text.
        place : str
            Name of the table in an error, such as its file.
        row : callable, optional
            It returns the name of a position of the frame in an error, such as "line 12".

        Returns
        -------
        Series of bool, shape (n,)
            It has the frame's index and no missing values.

        Raises
        ------
        InputError
            A column's type, or one of its values, cannot be compared with a literal.
        """
        return self._condition(frame, place, row)


def parse(text: str) -> Where:
    """Parse a condition.

    Parameters
    ----------
    text : str
        It has at most 4,000 characters and 50 parentheses inside one another.

    Returns
    -------
    Where

    Raises
    ------
    InputError
        The one line says what was found, at which character (from 1), and what was expected.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"--where: {len(text)} characters; at most {MAX_CHARACTERS} are read.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("--where: not UTF-8 text.")
    parser = _Parser(text)
    condition = parser.condition()
    return Where(text, tuple(parser.columns), condition)


class _Token(NamedTuple):
    kind: str  # This is the name of a group of _TOKEN.
    text: str
    at: int


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        found = match[kind]
        token = _Token(kind, found.lower() if kind in ("sign", "boolean") else found, match.start(kind))
        if kind == "wrong":
            wanted = "a literal, an operator or a name (in backquotes where it is not letters, digits and _)"
            raise _unexpected(token, f"a closing {found[0]}" if found[0] in "'\"`" else wanted)
        yield token


def _unexpected(token: _Token, wanted: str) -> InputError:
    found = "the end" if token.kind == "end" else repr(token.text if len(token.text) <= 30 else token.text[:30] + "...")
    return InputError(f"--where: found {found} at character {token.at + 1}, expected {wanted}.")


class _Parser:
    """A recursive descent parser, which only parentheses make descend.

    A method with ``negate=True`` returns the negation of what it parses. By De Morgan's laws, it negates the parts and
    exchanges ``and`` and ``or``; a comparison becomes its opposite.
    """

    def __init__(self, text: str) -> None:
        self.columns: dict[str, None] = {}  # This is an ordered set.
        self._tokens = list(_tokens(text))  # A token that is wrong anywhere is reported before anything else.
        self._at = 0
        self._depth = 0

    @property
    def _token(self) -> _Token:
        return self._tokens[self._at]

    def _accept(self, *signs: str) -> bool:
        """Take the next token if it is one of these."""
        found = self._token.kind == "sign" and self._token.text in signs
        self._at += found
        return found

    def _expect(self, wanted: str, *signs: str) -> str:
        """Take the next token, and refuse it if it is none of these."""
        token = self._token
        if not self._accept(*signs):
            raise _unexpected(token, wanted)
        return token.text

    def condition(self) -> _Condition:
        node = self._any(negate=False)
        if self._token.kind != "end":
            raise _unexpected(self._token, "and, or, or the end")
        return node

    def _any(self, negate: bool) -> _Condition:
        return self._chain("or", negate, lambda: self._chain("and", negate, lambda: self._one(negate)))

    def _chain(self, word: str, negate: bool, part: Callable[[], _Condition]) -> _Condition:
        parts = [part()]
        while self._accept(word):
            parts.append(part())
        join = operator.and_ if (word == "and") != negate else operator.or_
        return parts[0] if len(parts) == 1 else functools.partial(_joined, join, parts)

    def _one(self, negate: bool) -> _Condition:
        while self._accept("not"):
            negate = not negate
        opening = self._token
        if not self._accept("("):
            return self._comparison(negate)
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise _unexpected(opening, f"at most {MAX_NESTING} parentheses inside one another")
        node = self._any(negate)
        self._expect("and, or, or )", ")")
        self._depth -= 1
        return node

    def _comparison(self, negate: bool) -> _Condition:
        first = self._token
        if first.kind == "column":
            column = self._column()
            inverted = self._accept("not")
            if self._accept("in"):
                sign, values = "!=" if inverted else "==", self._list()
            elif inverted:
                raise _unexpected(self._token, "in")
            else:
                sign = self._operator("==, !=, <, <=, >, >=, in or not in")
                values = (self._ordered(self._token, self._literal(), sign),)
        elif first.kind in ("number", "text", "boolean"):
            value = self._literal()
            sign = _MIRRORED[self._operator("==, !=, <, <=, > or >=")]
            values = (self._ordered(first, value, sign),)
            column = self._column()
        else:
            raise _unexpected(first, "a comparison such as x_label == 0")
        return functools.partial(_compared, column, _OPPOSITE[sign] if negate else sign, values)

    @staticmethod
    def _ordered(token: _Token, value: Literal, sign: str) -> Literal:
        if isinstance(value, bool) and sign not in ("==", "!="):
            raise _unexpected(token, f"a number or a text: true and false have no order ({sign})")
        return value

    def _column(self) -> str:
        token = self._token
        if token.kind != "column":
            raise _unexpected(token, "the name of a column (in backquotes where it is not letters, digits and _)")
        self._at += 1
        name = token.text.strip("`")
        self.columns[name] = None
        return name

    def _operator(self, wanted: str) -> str:
        sign = self._expect(wanted, *_OPERATORS, *_SYNONYMS)
        return _SYNONYMS.get(sign, sign)

    def _literal(self) -> Literal:
        token = self._token
        self._at += 1
        match token.kind:
            case "number" if len(token.text) <= _MAX_DIGITS:
                return Decimal(token.text)
            case "number":
                raise _unexpected(token, f"a number of at most {_MAX_DIGITS} digits")
            case "text":
                quote = token.text[0]
                return token.text[1:-1].replace(quote * 2, quote)
            case "boolean":
                return token.text == "true"
        raise _unexpected(token, "a number, a text in quotes, true or false")

    def _list(self) -> tuple[Literal, ...]:
        closing = "]" if self._expect("a list such as [0, 1]", "[", "(") == "[" else ")"
        values: list[Literal] = []
        while True:
            token = self._token
            values.append(self._literal())
            if type(values[-1]) is not type(values[0]):
                raise _unexpected(token, "literals of one kind in a list: numbers, texts, or true and false")
            if self._expect(f", or {closing}", ",", closing) == closing:
                return tuple(values)


# Evaluation, by methods that pandas and cudf share.


def _joined(join: Callable[[Any, Any], Any], parts: list[_Condition], *table: Any) -> Any:
    return functools.reduce(join, (part(*table) for part in parts))


def _compared(
    name: str, sign: str, values: tuple[Literal, ...], frame: Any, place: str, row: Callable[[int], str]
) -> Any:
    """Compare a column with values. With several, the sign ``==`` means one of them and ``!=`` none of them."""
    column, place = frame[name], f"{place}, column {name}"
    kind, dtype = kind_of(column), str(column.dtype)
    if dtype.startswith("halffloat"):  # Arrow cannot compare float16.
        column = column.astype("float32[pyarrow]")
    missing = _flags(column.isna())
    if kind == "float":
        missing = missing | _flags(column != column)  # noqa: PLR0124 (NaN)
    if bool(missing.all()):
        return ~missing
    if kind in ("category", "decimal"):
        column = column.astype("str")
    if kind in ("text", "category", "decimal"):
        column = column.where(~missing, "0")
    compare: _Compare
    match values[0], kind:
        case (bool(), "boolean") | (str(), "text" | "category"):
            compare = functools.partial(_compare_values, column)
        case bool(), "text" | "category":
            compare = functools.partial(_compare_values, _booleans_in_text(column, place, row))
        case Decimal(), "integer":
            compare = functools.partial(_compare_integers, column)
        case Decimal(), "float":
            compare = lambda sign, value: _OPERATORS[sign](column, _rounded(value, dtype))  # noqa: E731
        case Decimal(), "decimal" | "text" | "category":
            compare = _numbers_in_text(column, place, row)
        case str(), "time":
            counts, per_day = time_counts(column)
            compare = lambda sign, value: _compare_integers(counts, sign, _days(value, place) * per_day)  # noqa: E731
        case value, _:
            holds, remedy = _MISMATCH.get(kind, (kind, "it cannot be compared"))
            literal = f"the number {value:f}" if isinstance(value, Decimal) else f"the text {value!r}"
            literal = str(value).lower() if isinstance(value, bool) else literal
            raise InputError(f"{place} holds {holds}, but --where compares it with {literal}; {remedy}.")
    found = (_flags(compare(sign, value)) for value in values)
    return functools.reduce(operator.or_ if sign == "==" else operator.and_, found) & ~missing


def kind_of(column: Any) -> str:
    """Return the kind of a column's values, from the names that pandas, Arrow and cudf give to types."""
    name = str(column.dtype).lower()
    if is_text(name):
        return "text"
    return next((kind for kind, pattern in _KINDS.items() if re.match(pattern, name)), f"values of type {name}")


def _flags(series: Any) -> Any:
    """Make plain booleans of booleans of any kind; a missing one becomes False."""
    return series.fillna(False).astype("bool")


def _refuse(text: Any, wrong: Any, place: str, row: Callable[[int], str], why: str) -> None:
    if bool(wrong.any()):
        at = first_true(wrong)
        raise InputError(f"{place}: {row(at)} is {shown(str(text.iloc[at]))}, but --where compares it with {why}.")


def _compare_values(column: Any, sign: str, value: Literal) -> Any:
    return _OPERATORS[sign](column, value)


def _booleans_in_text(text: Any, place: str, row: Callable[[int], str]) -> Any:
    lowered = text.str.lower()
    true = _flags(lowered.isin(["true", "1"]))
    _refuse(text, ~(true | _flags(lowered.isin(["false", "0"]))), place, row, "true or false (1 or 0)")
    return true


def _compare_integers(column: Any, sign: str, value: Decimal | Fraction) -> Any:
    """Compare integers with any number, exactly: a number between two integers is replaced by one of the two."""
    bound = math.ceil(value) if sign in ("<", ">=") else math.floor(value)
    limits = np.iinfo(np.uint64 if str(column.dtype).lower().startswith("uint") else np.int64)
    if limits.min <= bound <= limits.max and (bound == value or sign not in ("==", "!=")):
        return _OPERATORS[sign](column, limits.dtype.type(bound))
    always = sign == "!=" or sign in (("<", "<=") if value > 0 else (">", ">="))
    top = limits.dtype.type(limits.max)
    return column <= top if always else column > top


def _rounded(value: Decimal, kind: str) -> Any:
    """Round a literal to a type of floats, or to float64 where that type cannot hold it."""
    arrow = {"double": "float64", "float": "float32", "halffloat": "float16"}
    name = kind.lower().removesuffix("[pyarrow]")
    with np.errstate(over="ignore"):
        rounded = np.dtype(arrow.get(name, name)).type(value)
    if not np.isfinite(rounded):
        return np.float64(value)
    return np.float32(rounded) if rounded.dtype == np.float16 else rounded


def _numbers_in_text(text: Any, place: str, row: Callable[[int], str]) -> _Compare:
    """Compare numbers that are written as text, exactly.

    Whole numbers are compared as int64, others as float64, and those as decimals whose float64 is the literal's.
    """
    whole = _flags(text.str.match(WHOLE_NUMBER))
    number = whole | (_flags(text.str.match(_NUMBER_AS_TEXT)) & _flags(text.str.len() <= _MAX_LENGTH))
    _refuse(text, ~number, place, row, "a number; put that in quotes to compare texts")
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
    """Return times as integers since 1970, in the column's own unit, and the number of such units in a day."""
    kind = str(column.dtype)
    if kind.startswith("date32"):
        return column.astype("int32[pyarrow]"), 1
    unit = re.search(r"\[(s|ms|us|ns)\b", kind)
    seconds = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit[1] if unit else "ns"]
    return column.astype("int64[pyarrow]" if "pyarrow" in kind else "int64"), seconds * 86_400


def _days(text: str, place: str) -> Fraction:
    """Return the days from 1970 to an ISO 8601 date or time, exactly."""
    try:
        if re.search(r"\.[0-9]{7}", text):
            raise ValueError
        time = datetime.fromisoformat(text)
        since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError):
        remedy = "write '2024-01-31' or '2024-01-31 18:00'"
        raise InputError(f"{place} holds times, but --where compares it with {text[:40]!r}; {remedy}.") from None
    return Fraction(since // timedelta(microseconds=1), 86_400 * 10**6)
