"""Captions out of the JSON files that caption tools exchange, whatever their shape, by clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from models.family import InputError

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def clip_id(key: str) -> str:
    """A clip's id whatever a file calls it: "test/abc_0_10.mp4", a whole path or the id itself."""
    name = PurePosixPath(key.replace("\\", "/")).name
    return name[: -len(PurePosixPath(name).suffix)] if name.lower().endswith(EXTENSIONS) else name


def captions_by_clip(content: Any, where: str) -> dict[str, list[str]]:
    """Clip id -> its captions in order, of a parsed JSON file: predictions have one each, references one or more.

    Three shapes are read: a list of {"image_id", "caption"}, a mapping whose `annotations` is such a list, and a mapping of
    ids to a caption or a list of captions. InputError names the entry of `where` that fits none.
    """
    if isinstance(content, Mapping) and isinstance(content.get("annotations"), list):
        content, where = content["annotations"], f"{where}: annotations"
    found: dict[str, list[str]] = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise InputError(f"{where}: {key} has no caption but {value!r:.60}; give a text or a list of texts")
            found.setdefault(clip_id(str(key)), []).extend(texts)
        return found
    if not isinstance(content, list):
        raise InputError(f"{where}: a {type(content).__name__}; a list of captions or a mapping by clip was expected")
    for number, row in enumerate(content):
        if not isinstance(row, Mapping) or "image_id" not in row or not isinstance(row.get("caption"), str):
            raise InputError(f'{where}: entry {number} is {row!r:.60}; it needs "image_id" and a text "caption"')
        found.setdefault(clip_id(str(row["image_id"])), []).append(row["caption"])
    return found
