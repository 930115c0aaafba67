"""Short exact answers: which of them are the same; and where they are JSON, their shape and their fields.

    answer_key(" Blue pens.") == answer_key("blue pens")
    answer_key('{"item": "pens", "n": 10}') == answer_key('{"n":10,"item":"Pens"}')
    shape = shape_of(['{"item": "pens", "n": 10}', '{"item": "cups", "n": 2}'])
    fits(shape, '{"item": "cups", "n": 7}')   -> True        fits(shape, '{"item": "cups", "n": "seven"}') -> False
    share_of_fields_right('{"item": "pens", "n": 12}', '{"item": "pens", "n": 10}')  -> 0.5

JSON: RFC 8259, of which only objects and lists are read here; a bare number or text needs no shape. What a model writes
is data: it is read up to MAX_CHARACTERS and MAX_DEPTH, with each key once in its object and without NaN and Infinity.
"""

import json
import math
import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

MAX_CHARACTERS = (
    1 << 16
)  # an answer has at most a few hundred tokens, a right output of a test file may be longer
MAX_DEPTH = 32

# One that does not end goes on to the end of all: to look on from its next quote would take the square of the length.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)
# At the ends of a word; inside it "3.5" and "don't" keep theirs, and "-5" its sign.
_AROUND_A_WORD = "\"'`.,;:!?()\u201c\u201d\u2018\u2019"

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Path: TypeAlias = tuple[str | int, ...]  # ("items", 0, "name")


@dataclass(frozen=True)
class Shape:
    """What some JSON values have in common: a kind, an object's keys with their shapes, the shape of a list's items."""

    kind: str  # "object", "list", "text", "number", "truth value"; "anything" where the examples do not say
    may_be_null: bool = False
    fields: Mapping[str, "Shape"] = field(default_factory=dict)
    items: "Shape | None" = None


_ANYTHING = Shape("anything", may_be_null=True)


def folded(text: str) -> str:
    """Text in which two answers that say the same are equal: NFC, lower case, single spaces, no marks around words.

    Exact Match removes all punctuation, which makes 3.5 and 35 one answer; here they are two.
    """
    plain = unicodedata.normalize("NFC", text).lower()
    parts = (word.strip(_AROUND_A_WORD) or word for word in plain.split())
    return " ".join(parts)


def answer_key(answer: str) -> Hashable:
    """Equal for answers that say the same: JSON with the same fields, or equal folded texts."""
    value = parsed(answer)
    return folded(answer) if value is None else frozenset(_fields(value).items())


def parsed(answer: str) -> list[Json] | dict[str, Json] | None:
    """The object or list that an answer is in JSON; None for any other text, and for JSON out of bounds."""
    if answer.strip()[:1] not in ("{", "[") or len(answer) > MAX_CHARACTERS or _depth(answer) > MAX_DEPTH:
        return None
    try:
        value = json.loads(
            answer, object_pairs_hook=_object, parse_constant=_refused, parse_float=_finite_number
        )
    except ValueError:
        return None
    return value if isinstance(value, list | dict) else None


def shape_of(outputs: Sequence[str]) -> Shape | None:
    """The shape of the examples' outputs; None where one is no JSON, or they have different ones."""
    values = [parsed(output) for output in outputs]
    return _common_shape(values) if values and None not in values else None


def fits(shape: Shape, answer: str) -> bool:
    """Whether an answer is JSON of that shape."""
    value = parsed(answer)
    return value is not None and _fits(shape, value)


def share_of_fields_right(answer: str, reference: str) -> float:
    """The share of fields that answer and reference have in common, of all that either has, 0..1.

    A field is a text, number, truth value or null, or an empty list or object, with the keys and places that lead to
    it; texts are compared folded. An answer that is no JSON has no field right. A reference that is no JSON is a single
    field: an answer has to say the same.
    """
    right, given = parsed(reference), parsed(answer)
    if right is None:
        return float(answer_key(answer) == answer_key(reference))
    if given is None:
        return 0.0
    expected, found = _fields(right), _fields(given)
    paths = expected.keys() | found.keys()
    n_right = sum(path in expected and path in found and expected[path] == found[path] for path in paths)
    return n_right / len(paths)


def all_fields_right(answer: str, reference: str) -> float:
    """1.0 if all fields are right and there is no other; spacing and the order of keys do not count."""
    return float(share_of_fields_right(answer, reference) == 1.0)


def _fields(value: Json, path: Path = ()) -> dict[Path, Hashable]:
    """Every field of a value: its path, and what it is compared by."""
    parts: list[tuple[str | int, Json]] = []
    if isinstance(value, dict):
        parts = [*value.items()]
    elif isinstance(value, list):
        parts = [*enumerate(value)]
    if not parts:
        # With the kind, since Python takes 1 and true as equal.
        empty = isinstance(value, list | dict)
        content = folded(value) if isinstance(value, str) else None if empty else value
        return {path: (_kind(value), content)}
    found: dict[Path, Hashable] = {}
    for key, part in parts:
        found |= _fields(part, (*path, key))
    return found


def _common_shape(values: Sequence[Json]) -> Shape | None:
    """The shape that all values have; None where there is none."""
    present = [value for value in values if value is not None]
    may_be_null = len(present) < len(values)
    kinds = {_kind(value) for value in present}
    if not kinds:
        return _ANYTHING
    if len(kinds) > 1:
        return None
    kind = kinds.pop()
    objects = [value for value in present if isinstance(value, dict)]
    lists = [value for value in present if isinstance(value, list)]
    if objects:
        keys = objects[0].keys()
        if any(value.keys() != keys for value in objects):
            return None
        shapes = {key: _common_shape([value[key] for value in objects]) for key in keys}
        known = {key: shape for key, shape in shapes.items() if shape}
        return Shape(kind, may_be_null, known) if len(known) == len(shapes) else None
    if lists:
        items = _common_shape([item for value in lists for item in value])
        return Shape(kind, may_be_null, items=items) if items else None
    return Shape(kind, may_be_null)


def _fits(shape: Shape, value: Json) -> bool:
    if value is None:
        return shape.may_be_null
    if shape.kind not in (_kind(value), _ANYTHING.kind):
        return False
    if isinstance(value, dict) and shape.kind != _ANYTHING.kind:
        return value.keys() == shape.fields.keys() and all(
            _fits(shape.fields[key], part) for key, part in value.items()
        )
    if isinstance(value, list) and shape.items:
        return all(_fits(shape.items, item) for item in value)
    return True


def _kind(value: Json) -> str:
    match value:
        case dict():
            return "object"
        case list():
            return "list"
        case str():
            return "text"
        case bool():
            return "truth value"
        case None:
            return "null"
    return "number"


def _depth(text: str) -> int:
    """How deep brackets are nested, outside of strings."""
    depth = deepest = 0
    for character in _STRING.sub("", text):
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    value = {unicodedata.normalize("NFC", key): part for key, part in pairs}
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return value


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
