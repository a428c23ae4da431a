"""Ask a trained model about raw files: `python -m tasks.predict FAMILY CLIP … [--model M] [--top N] [--json FILE] [--out DIR]`.

M is a bundle's folder (artifacts/t3av/finetune by default) or a registered version (models:/duet-t3av@champion). DIR gets
what the family makes of its answers, such as subtitles. What is shown are answers that reach the threshold of their class,
which the bundle has from its validation clips, or --min-score.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import models
from models.family import Batch, InputError, Sample, Table, Window
from tasks import bundle, command, params, storage, tracking
from tasks.command import say
from tasks.data import audio, clip_files, feature_files, prepared
from tasks.data.batches import stack
from tasks.data.extraction import Extractor, Features, load_extractor
from tasks.data.frame_store import decode_jpegs
from tasks.data.loader import chosen_columns
from tasks.data.sound_files import read_sound
from tasks.data.video import ClipError, Preparation, StoredClip, read_clip
from tasks.data.windows import window_starts

SUFFIXES = (".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".ts")
BATCH = 8  # clips at once
WINDOWS = 2  # of a long video at once


class RawFeatures:
    """Features of raw files for a phase that takes them, made as those of its training data were."""

    def __init__(self, trained: bundle.Bundle, device: torch.device) -> None:
        self.dtype = trained.meta["features"]["dtype"]
        # None: trained on features that were made elsewhere, which none of ours can make.
        self.extractor: Extractor | None = None
        if trained.meta["features"]["phase"]:
            self.extractor = load_extractor(bundle.load(trained.path.with_name(bundle.FEATURES)), device)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files that have them, or of which they can be made."""
        return SUFFIXES if self.extractor else (clip_files.FEATURES,)

    def read(self, clip: Path | bytes) -> Features | str:
        """The features of a clip; or, of one that cannot be used, why."""
        if isinstance(clip, Path) and not clip.is_file():
            return "no such file"
        try:
            if isinstance(clip, Path) and clip_files.is_features(clip):
                rows = np.array(feature_files.open_features(clip), np.float32)
                return Features(rows, np.arange(len(rows), dtype=np.float32), len(rows))
            if self.extractor is None:
                return "the model was trained on features that were made elsewhere; give the path of such a .npy"
            source = io.BytesIO(clip) if isinstance(clip, bytes) else clip
            _, found = next(self.extractor.extract([source]))
        except ClipError as error:
            return str(error)
        if isinstance(found, ClipError):
            return str(found)
        return dataclasses.replace(found, rows=found.rows.astype(self.dtype).astype(np.float32))


class Predictor:
    """A bundle that answers for raw files, prepared by the same decode, resize and codecs as its training data."""

    def __init__(self, trained: bundle.Bundle) -> None:
        phase = models.load(trained.family).phases[trained.phase]
        if phase.present is None:
            raise InputError(
                f"{trained.family} {trained.phase} has no answers for people; name the bundle of a later phase"
            )
        self.facts, self.phase, self.spec = trained.facts, phase, phase.clip(trained.config)
        self.config, self.present, self.merge = trained.config, phase.present, phase.merge
        self.transform = phase.transform(trained.config, trained.facts, False)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = trained.module().to(self.device)
        self.is_prepared = bool(trained.meta.get("prepared"))  # trained on such clips: no video can be made into one
        self.maker = RawFeatures(trained, self.device) if self.spec.features else None
        self.suffixes = (clip_files.SUFFIX,) if self.is_prepared else self.maker.suffixes if self.maker else SUFFIXES
        self.codec: audio.Codec = trained.meta["stores"]["codec"]
        fields = [field.name for field in dataclasses.fields(Preparation)]
        made = {"frame_step": 0, **trained.meta["stores"]}  # bundles from before there were steps do not name it
        stores = {key: made[key] for key in fields}
        self.preparation = params.typed(Preparation, stores, "stores")
        self.sounds: Path | None = None  # folder of <clip>.mp3 to hear in place of the videos' own tracks

    def predict(self, clips: Sequence[Path | bytes], top: int = 5) -> list[dict[str, Any]]:
        """`answers` as people see them: lists within without what is not believed, and cut to `top`."""
        if top < 1:
            raise InputError(f"top is {top}; ask for 1 answer or more")
        return [self.shown(answer, top) for answer in self.answers(clips)]

    def answers(self, clips: Sequence[Path | bytes]) -> list[dict[str, Any]]:
        """One answer a clip, in order and in full. A clip that cannot be read has but an "error"."""
        answers: list[dict[str, Any]] = []
        for start in range(0, len(clips), BATCH):
            group = clips[start : start + BATCH]
            answers += [self._video(clip) for clip in group] if self.spec.window else self._clips(group)
        return answers

    def shown(self, answer: Mapping[str, Any], top: int) -> dict[str, Any]:
        """Of the lists of an answer the first `top` items that are believed."""

        def is_believed(item: Any) -> bool:
            told = isinstance(item, Mapping) and item.keys() >= {"label", "score"}
            return not told or self.facts.believes(item["label"], item["score"])

        return {
            key: list(islice(filter(is_believed, value), top)) if isinstance(value, list) else value
            for key, value in answer.items()
        }

    def believe_from(self, score: float) -> None:
        """Show every answer from this score in [0, 1] on, whatever its class; InputError for a phase that tells no scores."""
        if self.phase.calibrate is None:
            raise InputError("--min-score: the answers of this model are not chosen by their score; leave it out")
        if not 0 <= score <= 1:
            raise InputError(f"--min-score is {score}; scores go from 0 to 1")
        names = [name for names in self.facts.labels.values() for name in names]
        self.facts = dataclasses.replace(self.facts, thresholds=dict.fromkeys(names, score))

    def _clips(self, clips: Sequence[Path | bytes]) -> list[dict[str, Any]]:
        """Answers for clips that are taken whole."""
        samples = [self._read(clip) for clip in clips]
        good = iter(self._answer([sample for sample in samples if isinstance(sample, Sample)]))
        return [next(good) if isinstance(sample, Sample) else {"error": sample} for sample in samples]

    def _video(self, clip: Path | bytes) -> dict[str, Any]:
        """The answer for a video of any length, from all its windows."""
        stored = self._stored(clip)
        if isinstance(stored, str):
            return {"error": stored}
        return {"duration": stored.duration, **self._answer(self._windows(clip, stored))[0]}

    def _answer(self, samples: Iterable[Sample]) -> list[dict[str, Any]]:
        """One answer a clip."""
        parts: list[Batch] = []
        waiting = iter(samples)
        while group := list(islice(waiting, WINDOWS if self.spec.window else BATCH)):
            batch = stack([self.transform(sample) for sample in group])
            with torch.inference_mode():
                found = self.module({key: value.to(self.device) for key, value in batch.items()})
            parts.append({key: value.cpu() for key, value in found.items()})
        if not parts:
            return []
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        whole = self.merge(self.config, whole) if self.merge else whole
        return self.present({key: value.float() for key, value in whole.items()}, self.facts)

    def _stored(self, clip: Path | bytes) -> StoredClip | str:
        """A video as the stores would hold it; or, of one that cannot be used, why."""
        if isinstance(clip, Path) and not clip.is_file():
            return "no such file"
        if isinstance(clip, Path) and clip_files.is_prepared(clip):
            return "the model was trained on videos; give a video"
        try:
            stored = read_clip(io.BytesIO(clip) if isinstance(clip, bytes) else clip, self.preparation)
            if self.sounds is None or isinstance(clip, bytes):
                return stored
            sound = self.sounds / f"{clip.stem}.mp3"
            if not sound.is_file():
                return f"no sound {sound}"
            return dataclasses.replace(stored, wave=read_sound(sound, self.preparation.sample_rate, sound.name)[0])
        except ClipError as error:
            return str(error)

    def _windows(self, clip: Path | bytes, stored: StoredClip) -> Iterator[Sample]:
        """The windows of a video, in order."""
        assert self.spec.window is not None
        length, step = self.spec.num_frames, self.preparation.frame_step / stored.fps
        for first in window_starts(len(stored.jpegs), length, self.spec.window.stride):
            frames = decode_jpegs(stored.jpegs[first : first + length])
            place = Window(first, step, stored.duration, clip=0)
            yield Sample(_name(clip), frames, None, {}, np.random.default_rng(0), window=place)

    def _read(self, clip: Path | bytes) -> Sample | str:
        """What the transform takes; or, of a clip that cannot be used, why."""
        if self.is_prepared:
            return self._read_prepared(clip)
        made = self.maker.read(clip) if self.maker else None
        if isinstance(made, str):
            return made
        frames = wave = None
        if self.spec.num_frames or self.spec.audio_seconds:
            stored = self._stored(clip)
            if isinstance(stored, str):
                return stored
            wave = self._heard(stored)
            if self.spec.num_frames:
                columns = chosen_columns(self.spec, len(stored.jpegs), None)
                frames = decode_jpegs([stored.jpegs[i] for i in columns])
        sample = Sample(id=_name(clip), frames=frames, wave=wave, annotation={}, rng=np.random.default_rng(0))
        return dataclasses.replace(sample, features=made.rows, feature_times=made.times) if made else sample

    def _heard(self, stored: StoredClip) -> np.ndarray | None:
        """The sound of a clip as the phase takes it from the stores; None without any."""
        if not self.spec.audio_seconds or stored.wave is None or not len(stored.wave):
            return None
        rate = stored.sample_rate
        if rate != self.spec.sample_rate:
            raise InputError(f"the bundle's stores have {rate} Hz and its phase hears {self.spec.sample_rate} Hz")
        heard, _ = audio.decode(audio.encode(stored.wave, rate, self.codec), rate)
        return heard[: round(rate * self.spec.audio_seconds)]

    def _read_prepared(self, clip: Path | bytes) -> Sample | str:
        """The same of a prepared clip."""
        if isinstance(clip, Path) and not clip.is_file():
            return "no such file"
        if isinstance(clip, bytes) or not clip_files.is_prepared(clip):
            return "the model was trained on clips prepared elsewhere; give the path of such a .pt"
        try:
            columns = chosen_columns(self.spec, prepared.open_pictures(clip).shape[1], None)
            frames = prepared.decode(clip, columns) if self.spec.num_frames else None
            mel = prepared.decode_sound(clip_files.files_of(clip)[1]) if self.spec.audio_seconds else None
        except ClipError as error:
            return str(error)
        return Sample(clip.stem, frames, None, {}, np.random.default_rng(0), mel)


def _name(clip: Path | bytes) -> str:
    return "bytes" if isinstance(clip, bytes) else clip.stem


def load_predictor(family: str, model: str) -> Predictor:
    """From a bundle's folder or a models:/ address; InputError when it is of another family."""
    folder = tracking.download_bundle(model) if model.startswith("models:/") else Path(model)
    trained = bundle.load(folder)
    if trained.family != family:
        raise InputError(f"{model} is a bundle of {trained.family}, not of {family}")
    return Predictor(trained)


def media_files(given: Sequence[Path], suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files given, those below the folders given, sorted within each, and those that .list files name, one a line."""
    found: list[Path] = []
    for path in given:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes) if path.is_dir() else [path]
        if path.suffix == ".list" and path.is_file():
            inside = [Path(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not inside:
            raise InputError(f"{path}: no video files in it ({', '.join(suffixes)})")
        found += inside
    return found


def table(answers: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row an answer: its texts and numbers as columns, `answer` with everything as JSON, `error` ("" when none)."""
    rows = [{key: value for key, value in a.items() if isinstance(value, (str, int, float))} for a in answers]
    frame = pd.DataFrame(rows).assign(answer=[json.dumps(a, ensure_ascii=False) for a in answers])
    return frame.assign(error=[a.get("error", "") for a in answers])


def readable(answer: Mapping[str, Any]) -> str:
    """An answer in one line: `label dog barking, score 0.93, top: dog barking 0.93; cat meowing 0.03`.

    Times have minutes: `duration 1:14.0, segments: 0:12.4-0:15.0 jump 0.93; 1:02.7-1:09.3 run 0.81`.
    """
    words = {key: _clock(value) if key == "duration" else _words(value) for key, value in answer.items()}
    return ", ".join(f"{key}{':' if isinstance(answer[key], list) else ''} {text}" for key, text in words.items())


def _words(value: Any) -> str:
    match value:
        case float():
            return f"{value:.3g}"
        case []:
            return "none"
        case list():
            is_nested = any(isinstance(item, (list, dict)) for item in value)
            return ("; " if is_nested else " ").join(map(_words, value))
        case {"segment": [start, end], **rest}:
            return f"{_clock(start)}-{_clock(end)} {_words(rest)}"
        case {"label": label, "score": score}:
            return f"{label} {_words(score)}"
        case Mapping():
            return " ".join(map(_words, value.values()))
    return str(value)


def _clock(seconds: float) -> str:
    """m:ss.s"""
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


def _batches(files: list[Path]) -> Iterator[list[Path]]:
    for start in tqdm(range(0, len(files), BATCH), desc="predict", unit="batch", disable=len(files) <= BATCH):
        yield files[start : start + BATCH]


# --- files -----------------------------------------------------------------------------------------------------------------


def check_names(files: Sequence[Path], out: Path) -> None:
    """InputError for videos whose files in `out` would be the same, or not in it."""
    owners: dict[str, Path] = {}
    for file in files:
        other = owners.setdefault(file.stem, file)
        if other is not file:
            raise InputError(f"--out: {other} and {file} would write the same files; rename one, or run once for each")
        storage.inside(out, file.stem, str(file))


def write_files(files: Mapping[str, str | Table], out: Path) -> None:
    """Write texts as they are, tables as pictures, each atomically; InputError for a name that leads out of the folder."""
    from tasks import report  # Matplotlib takes a second to import

    for name, content in tqdm(files.items(), desc="files", unit="file", leave=False):
        with storage.atomic_file(storage.inside(out, name, "the answers' files")) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else report.draw(content))


# --- the command -----------------------------------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.predict", description="What a trained model says of raw clips."
    )
    parser.add_argument("family", choices=models.names())
    parser.add_argument(
        "clips", nargs="+", type=Path, help="video files, folders of them, or .list files with one a line"
    )
    parser.add_argument("--model", help="bundle folder or models:/ address; the family's final phase in artifacts/")
    parser.add_argument("--top", type=int, default=5, help="how many answers a clip at most, printed and with --json")
    parser.add_argument("--min-score", type=float, help="show answers from this score on, not from their class's own")
    parser.add_argument("--sounds", type=Path, help="folder of <clip>.mp3 to hear in place of the videos' own tracks")
    parser.add_argument("--json", type=Path, help="write the answers to this file too")
    parser.add_argument(
        "--out", type=Path, help="write what the family has for people, such as subtitles, to this folder"
    )
    parser.add_argument("--form", help="of the files in --out, where the family has several; the first of them")
    return parser.parse_args()


def main() -> None:
    """Print one line a clip; exit 1 when any could not be read."""
    given = read_arguments()
    final = models.load(given.family).final
    predictor = load_predictor(given.family, given.model or str(storage.ARTIFACTS / given.family / final))
    predictor.sounds = given.sounds
    if given.top < 1:
        raise InputError(f"--top is {given.top}; ask for 1 answer or more")
    if given.sounds and not given.sounds.is_dir():
        raise InputError(f"--sounds: {given.sounds} is no folder; name the one with <clip>.mp3 of each video")
    if given.min_score is not None:
        predictor.believe_from(given.min_score)
    clips, exports = media_files(given.clips, predictor.suffixes), predictor.phase.exports
    form = given.form or next(iter(exports), "")
    if given.out:
        check_names(clips, given.out)
        if form not in exports:
            known = f"has {', '.join(exports)}" if exports else "makes no files of its answers; use --json"
            raise InputError(f"--out, form {form or 'none'}: {given.family} {known}")
    answers: list[dict[str, Any]] = []
    whole: dict[str, dict[str, Any]] = {}
    for files in _batches(clips):
        for file, answer in zip(files, predictor.answers(files), strict=True):
            shown = predictor.shown(answer, given.top)
            answers.append({"clip": str(file), **shown})
            say(f"{file}: {readable(shown)}")
            if "error" not in answer:
                whole[file.stem] = answer
    if given.json:
        with storage.atomic_file(given.json) as temporary:
            temporary.write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
    if given.out:
        made = exports[form](whole, predictor.facts)
        write_files(made, given.out)
        say(f"{len(made)} files in {given.out}")
    if failed := sum("error" in answer for answer in answers):
        print(f"error: {failed} of {len(answers)} clips could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
