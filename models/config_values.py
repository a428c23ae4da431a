"""Values of another system's config file: of the right kind, and put into their places here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.family import InputError

Convert = Callable[[Any], Any]


def integer(value: Any) -> int:
    """A whole number, also where it is written as text or as 8.0."""
    number = float(value)
    if isinstance(value, bool) or number != int(number):
        raise ValueError
    return int(number)


def number(value: Any) -> float:
    """A number, also 1e-4, which YAML 1.1 takes for text."""
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def switch(value: Any) -> bool:
    """true or false, and nothing that is like them."""
    if not isinstance(value, bool):
        raise ValueError
    return value


def text(value: Any) -> str:
    """Words."""
    if not isinstance(value, str):
        raise ValueError
    return value


def texts(value: Any) -> list[str]:
    """A list of words."""
    if not isinstance(value, list):
        raise ValueError
    return [text(item) for item in value]


KINDS = {
    integer: "a whole number",
    number: "a number",
    switch: "true or false",
    text: "a text",
    texts: "a list of texts",
}


def converted(key: str, value: Any, convert: Convert) -> Any:
    """The value as one of the functions above reads it; InputError naming the key where it cannot."""
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{key} is {value!r}; it must be {KINDS[convert]}") from None


def put(sections: dict[str, Any], place: str, value: Any) -> None:
    """Set the value at a dotted place; sections on the way there are made."""
    *folders, last = place.split(".")
    for key in folders:
        sections = sections.setdefault(key, {})
    sections[last] = value
