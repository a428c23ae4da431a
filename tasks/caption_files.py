"""Captions out of the files that caption tools exchange, whatever their shape, by clip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.family import InputError
from tasks.data.clip_files import row_id as clip_id
from tasks.datasets import favd_files


def read(path: Path) -> dict[str, list[str]]:
    """Clip id -> its captions in order, of a JSON file (see `captions_by_clip`) or of a caption TSV of FAVDBench.

    InputError where there is no such file, where it is neither, and for the row or entry that says no caption.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a JSON file of captions by clip, or a caption TSV of FAVDBench")
    if path.suffix.lower() == ".tsv":
        found: dict[str, list[str]] = {}
        for entry in favd_files.read_captions(path):
            found.setdefault(clip_id(entry.key), []).extend(row["caption"] for row in entry.captions)
        return found
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON in UTF-8 ({error}); give a file of captions by clip") from None
    return captions_by_clip(content, str(path))


def captions_by_clip(content: Any, where: str) -> dict[str, list[str]]:
    """Clip id -> its captions in order, of a parsed JSON file: predictions have one each, references one or more.

    Three shapes are read: a list of {"image_id", "caption"}, a mapping whose `annotations` is such a list, and a mapping of
    ids to a caption or a list of captions. An id may be the path of a video. InputError names the entry that fits none.
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
