"""SPICE of captions, by the original Java program where a person has it: spice-1.0.jar beside its folder lib."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from models.family import InputError

MEMORY = "8G"  # of the Java machine: its parser needs it


def find(jar: str) -> tuple[str, Path]:
    """The programs java and SPICE; InputError where this machine lacks one."""
    java, program = shutil.which("java"), Path(jar).expanduser().resolve()
    if java is None:
        raise InputError("SPICE needs Java and this machine has no program java; install one, or leave SPICE out")
    if not program.is_file():
        raise InputError(f"{jar}: no such file; name spice-1.0.jar as coco-caption unpacks it, or leave SPICE out")
    return java, program


def spice(jar: str, candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Clip id -> SPICE's F-score in [0, 1], NaN where the program gives none; the corpus is their mean.

    InputError where there is no Java or no such file, and where the program fails, with the last line it wrote.
    """
    java, program = find(jar)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "in.json", Path(folder) / "out.json"
        rows = [{"image_id": clip, "test": text, "refs": list(references[clip])} for clip, text in candidates.items()]
        asked.write_text(json.dumps(rows))
        command = [java, f"-Xmx{MEMORY}", "-jar", program, asked, "-out", answered, "-subset", "-silent"]
        done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True)
        if done.returncode or not answered.is_file():
            said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise InputError(f"{jar}: java ended with {done.returncode}: {said[-1] if said else 'nothing said'}")
        return _scores(answered.read_text(), candidates, jar)


def _scores(text: str, candidates: Mapping[str, str], jar: str) -> dict[str, float]:
    """The F-scores out of the program's answer; a clip's is null where neither caption says anything."""
    try:
        rows = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(text)}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{jar}: its answer is not that of spice-1.0.jar ({error!r}); name the original") from None
    if missing := [clip for clip in candidates if clip not in rows]:
        raise InputError(
            f"{jar}: it says nothing of {missing[0]} and {len(missing) - 1} more clips; run it by hand to see"
        )
    return {clip: np.nan if rows[clip] is None else float(rows[clip]) for clip in candidates}
