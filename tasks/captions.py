"""Score a file of captions against another: `python -m tasks.captions PREDICTIONS REFERENCES`.

A file is JSON, a list of {"image_id", "caption"}, such a list below `annotations` (COCO's), or a mapping of ids to captions; or
a caption TSV of FAVDBench. An id may be the path of a video. Clips that are in one file only are named, and make the exit
code 1; the scores are those of the others. Judges see and hear the stores of --dataset.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models import caption_scores
from models.entity_score import entity_overlap
from models.family import InputError
from models.meteor import meteor
from models.metrics import full_name
from tasks import caption_files, command, storage
from tasks.command import say
from tasks.judges import NONE, Judges, Weights

NAMED = 5  # clips that a message names


@dataclass(frozen=True)
class Scores:
    """What is known of captions."""

    corpus: dict[str, float]  # name of a metric -> its value
    clips: dict[str, np.ndarray]  # name of a metric -> (N,), NaN where it says nothing of a clip


def score(captions: Mapping[str, str], references: Mapping[str, Sequence[str]], judges: Judges, dataset: str) -> Scores:
    """All metrics of captions by clip id. BLEU and METEOR of a corpus are not the means over its clips; others are.

    CIDEr-D in [0, 10], `clip_score` in [0, 2.5], `audio_score_legacy` in [0, 100], everything else in [0, 1].
    """
    texts, truths = list(captions.values()), [references[clip] for clip in captions]
    bleu, words = caption_scores.bleu(texts, truths), meteor(texts, truths)
    names = [f"bleu_{order}" for order in range(1, caption_scores.ORDERS + 1)]
    clips = dict(zip(names, bleu.clips().T, strict=True)) | {"meteor": words.clips()}
    clips |= {"rouge_l": caption_scores.rouge_l(texts, truths), "cider_d": caption_scores.cider_d(texts, truths)}
    clips |= {"entity_f1": entity_overlap(texts, truths)["entity_f1"]} | judges.judge(dataset, captions, references)
    corpus = {name: float(np.nanmean(each)) for name, each in clips.items() if np.isfinite(each).any()}
    corpus |= dict(zip(names, bleu.corpus().tolist(), strict=True)) | {"meteor": words.corpus()}
    return Scores(corpus, clips)


def table(found: Scores) -> list[str]:
    """A line a metric: its name, its value, and how many clips have one."""
    names = {name: full_name(name) for name in found.clips}
    width = max(map(len, names.values()))
    rows = [
        (title, found.corpus.get(name, np.nan), np.isfinite(found.clips[name]).sum()) for name, title in names.items()
    ]
    return [f"{'metric':<{width}}     value  clips"] + [
        f"{title:<{width}}  {value:8.4f}  {n:5d}" for title, value, n in rows
    ]


def write(path: Path, ids: Sequence[str], found: Scores, unpaired: Mapping[str, Sequence[str]]) -> None:
    """The scores of the corpus, those of each clip, null where there is none, and the clips of one file only."""
    rows = zip(*(values.tolist() for values in found.clips.values()), strict=True)
    told = [{name: v if np.isfinite(v) else None for name, v in zip(found.clips, row, strict=True)} for row in rows]
    content = {"metrics": found.corpus, "clips": dict(zip(ids, told, strict=True)), **unpaired}
    with storage.atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def pair(predictions: Path, references: Path) -> tuple[dict[str, str], dict[str, list[str]], dict[str, list[str]]]:
    """Captions and references by clip of those that have both, and the clips of one file only, by what they lack.

    InputError where a clip is predicted twice, and where no clip is in both.
    """
    answers, truths = caption_files.read(predictions), caption_files.read(references)
    if twice := [clip for clip, texts in answers.items() if len(texts) > 1]:
        raise InputError(f"{predictions}: {twice[0]} has {len(answers[twice[0]])} captions; leave it one")
    both = [clip for clip in answers if clip in truths]
    if not both:
        first, other = (next(iter(found), "none at all") for found in (answers, truths))
        raise InputError(f"{predictions} and {references} have no clip in common ({first} there, {other} here)")
    unpaired = {
        "without_reference": [clip for clip in answers if clip not in truths],
        "without_prediction": [clip for clip in truths if clip not in answers],
    }
    return {clip: answers[clip][0] for clip in both}, {clip: truths[clip] for clip in both}, unpaired


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path, help="one caption of each clip")
    parser.add_argument("references", type=Path, help="one or more of each")
    parser.add_argument(
        "--clip", default=NONE, help="CLIPScore: folder of openai/clip-vit-base-patch32; with --dataset"
    )
    parser.add_argument("--trilip", default=NONE, help="AudioScore: FAVDBench's TriLip.bin; with --clip")
    parser.add_argument("--dataset", default="", help="whose stores hold the clips")
    parser.add_argument("--t5", default=NONE, help="EntityScore: folder of t5-base")
    parser.add_argument("--spice", default=NONE, help="SPICE: spice-1.0.jar beside its folder lib; needs Java")
    parser.add_argument("--json", type=Path, help="file for all scores, those of each clip too")
    given = parser.parse_args()
    if given.trilip != NONE and given.clip == NONE:
        parser.error("--trilip needs --clip, the folder of the CLIP inside it")
    if given.clip != NONE and not given.dataset:
        parser.error("--clip needs --dataset, whose stores hold the pictures and sounds")
    return given


def main() -> None:
    """Score one file."""
    given = arguments()
    captions, references, unpaired = pair(given.predictions, given.references)
    weights = Weights(clip=given.clip, trilip=given.trilip, t5=given.t5, spice=given.spice)
    judges = Judges(weights, "cuda" if torch.cuda.is_available() else "cpu")
    found = score(captions, references, judges, given.dataset)
    for line in table(found):
        say(line)
    if given.json:
        write(given.json, list(captions), found, unpaired)
    told = [
        f"{len(clips)} {kind.replace('_', ' ')} ({', '.join(clips[:NAMED])}{', …' if len(clips) > NAMED else ''})"
        for kind, clips in unpaired.items()
        if clips
    ]
    if told:
        raise InputError(f"not scored: {' and '.join(told)}; give both files the same clips")


if __name__ == "__main__":
    command.run(main)
