"""What videotag reports on the test split: how it ranks tags, how far its scores can be believed, and clips to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from models import metrics, scoring, tag_scores
from models.family import Batch, ClipInfo, Evaluation, Example, InputError, Results, Table
from models.tag_scores import Pairs
from models.videotag import answers
from models.videotag.answers import TOP

RECALL = np.linspace(0, 1, 21)  # where the precision-recall curve is drawn
HALF = 0.5  # the threshold that one takes who has not calibrated any
NUM_TIMELINES = 6
NUM_NAMED = 5  # tags of an example


class TagMetrics:
    """Scores predictions["logits"] (B, C) against batch["tags"] (B, C); of a clip no more is kept than its k best scores."""

    def __init__(self, k: int) -> None:
        self.gap = tag_scores.GlobalPrecision(k)
        self.clips: dict[str, list[np.ndarray]] = {"hit_at_1": [], "perr": [], "loss": []}

    def update(self, predictions: Batch, batch: Batch) -> None:
        """Take one batch."""
        logits, truth = predictions["logits"].double().numpy(), batch["tags"].numpy() > 0
        scores = expit(logits)
        self.gap.update(scores, truth)
        self.clips["hit_at_1"].append(tag_scores.hits_at(scores, truth, 1))
        self.clips["perr"].append(tag_scores.equal_recall_precision(scores, truth))
        self.clips["loss"].append((np.logaddexp(0, logits) - truth * logits).mean(axis=1))

    def compute(self) -> dict[str, float]:
        """gap, hit_at_1, perr in [0, 1]; loss is the mean binary cross-entropy in nats, whatever loss training has."""
        return {"gap": self.gap.compute()} | {
            name: float(np.mean(np.concatenate(parts))) for name, parts in self.clips.items()
        }


@dataclass(frozen=True)
class Answers:
    """The tagger's answers for the test split."""

    clips: list[ClipInfo]
    labels: list[str]
    truth: np.ndarray  # (N, C) bool
    scores: np.ndarray  # (N, C) float64 in [0, 1]
    cuts: np.ndarray  # (C,) scores from which on a tag is believed
    pairs: Pairs  # each clip's TOP best

    @property
    def believed(self) -> np.ndarray:
        """(N, C) bool."""
        return self.scores >= self.cuts


def evaluate(run: Evaluation) -> Results:
    """Score the test split once: all numbers flat, in [0, 1] unless they are counts."""
    found = read(run)
    seen = clip_scores(found)
    support = found.truth.sum(axis=0)
    areas = tag_scores.average_precisions(found.scores, found.truth)
    values = {name: float(statistic(np.ones((1, len(found.clips))))[0]) for name, statistic in seen.items()}
    values |= {"map": float(np.nanmean(areas)), "ece": tag_scores.calibration_error(found.pairs.score, found.pairs.hit)}
    values |= {"num_clips": float(len(found.clips)), "num_tags": float(support.sum())}
    values |= intervals(run, seen) | baseline(run, found) | of_frames(run, found)
    tables = {
        "per_class": per_class(found, areas),
        "decisions": decisions(found),
        "precision_recall": precision_recall(found),
        "reliability": reliability(found),
        "predictions": Table("Every clip", predictions(found)),
    }
    drawn = timelines(run, found)
    return Results(values, tables | ({"timelines": drawn} if drawn else {}), examples(found))


def read(run: Evaluation) -> Answers:
    """Truth and scores of the test clips; InputError where none has a tag."""
    clips, labels = run.clips("test"), run.facts.labels["tag"]
    truth = answers.true_tags(clips, len(labels))
    if not truth.any():
        raise InputError("no clip of the test split has a tag; evaluation needs some to compare with")
    scores = answers.probabilities(run.predict("tagger", "test")["logits"], clips, "tagger")
    pairs = tag_scores.top_pairs(scores, truth, TOP)
    return Answers(clips, labels, truth, scores, answers.thresholds(run.facts), pairs)


def global_precision(table: pd.DataFrame) -> Callable[[np.ndarray], np.ndarray]:
    """The headline out of the table `predictions`, as a statistic for models.metrics.bootstrap."""
    truth = [json.loads(text) for text in table["tags"]]
    best = [json.loads(text) for text in table["best"]]
    rows = [(clip, tag, score) for clip, own in enumerate(best) for tag, score in own]
    clip, tag, score = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    hit = np.array([tag in own for own, listed in zip(truth, best, strict=True) for tag, _ in listed], dtype=bool)
    pairs = Pairs(clip.astype(np.int64), tag.astype(np.int64), score, hit)
    return tag_scores.weighted_gap(pairs, np.array([len(own) for own in truth]))


# --- numbers ---------------------------------------------------------------------------------------------------------------


def clip_scores(found: Answers) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """The numbers that have intervals, as statistics of clips."""
    truth, scores = found.truth, found.scores
    return {
        f"gap_{TOP}": tag_scores.weighted_gap(found.pairs, truth.sum(axis=1)),
        "hit_at_1": metrics.weighted_mean(tag_scores.hits_at(scores, truth, 1)),
        "perr": metrics.weighted_mean(tag_scores.equal_recall_precision(scores, truth)),
        "micro_f1": tag_scores.weighted_micro_f1(truth, found.believed),
        "macro_f1": tag_scores.weighted_macro_f1(truth, found.believed),
    }


def intervals(run: Evaluation, seen: dict[str, Callable[[np.ndarray], np.ndarray]]) -> dict[str, float]:
    """95 % bootstrap intervals; clips of one group are drawn together."""
    groups = [clip.group for clip in run.clips("test")]
    return metrics.intervals(seen, groups, run.num_bootstrap, run.seed)


def baseline(run: Evaluation, found: Answers) -> dict[str, float]:
    """Scores of answering every clip with the most frequent tags of training: what is worth nothing."""
    share = answers.true_tags(run.clips("train"), len(found.labels)).mean(axis=0)
    everybody, truth = np.tile(share, (len(found.clips), 1)), found.truth
    gap = tag_scores.GlobalPrecision(TOP)
    gap.update(everybody, truth)
    return {
        f"baseline_gap_{TOP}": gap.compute(),
        "baseline_hit_at_1": float(tag_scores.hits_at(everybody, truth, 1).mean()),
        "baseline_perr": float(tag_scores.equal_recall_precision(everybody, truth).mean()),
    }


def of_frames(run: Evaluation, found: Answers) -> dict[str, float]:
    """How often one of the best 1 and 5 answers of the network under the features is right, where it was trained here."""
    if "tsn" not in run.trained:
        return {}
    scores = answers.probabilities(run.predict("tsn", "test")["logits"], found.clips, "tsn")
    return {f"tsn_top{k}": float(tag_scores.hits_at(scores, found.truth, k).mean()) for k in (1, 5)}


# --- tables ----------------------------------------------------------------------------------------------------------------


def per_class(found: Answers, areas: np.ndarray) -> Table:
    """Each class: how often it is there, how well it is ranked, and what its threshold gives."""
    truth, believed = found.truth, found.believed
    support = truth.sum(axis=0)
    precision, recall, f1 = tag_scores.precision_recall_f1(
        (truth & believed).sum(axis=0), believed.sum(axis=0), support
    )
    frame = pd.DataFrame({"class": found.labels, "id": np.arange(len(support)), "support": support, "AP": areas})
    frame[f"AP@{TOP}"] = tag_scores.pooled_average_precisions(found.pairs, support)
    frame = frame.assign(threshold=found.cuts, precision=precision, recall=recall, F1=f1)
    note = (
        f"AP: of all clips, ranked by the class's score; AP@{TOP}: of those alone that have it among their {TOP} best. Empty "
        "where the test split lacks the class. A tag is believed from its threshold on, which the validation clips gave."
    )
    return Table("Per class", frame, note)


def decisions(found: Answers) -> Table:
    """What one gets who believes tags by the thresholds, and by one for all that nobody calibrated."""
    rows = []
    for name, believed in (("each its own", found.believed), (f"{HALF} for all", found.scores >= HALF)):
        counts = [int(values.sum()) for values in (found.truth & believed, believed, found.truth)]
        precision, recall, f1 = tag_scores.precision_recall_f1(*map(np.array, counts))
        macro = tag_scores.weighted_macro_f1(found.truth, believed)(np.ones((1, len(found.clips))))[0]
        rows.append((name, float(precision), float(recall), float(f1), float(macro)))
    frame = pd.DataFrame(rows, columns=["threshold", "precision", "recall", "Micro-F1", "Macro-F1"])
    note = (
        "Thresholds were chosen on the validation clips. Macro-F1 is the mean over the classes that the test split has."
    )
    return Table("Scores to believe", frame, note, "bars")


def precision_recall(found: Answers) -> Table:
    """The curve of all tags together."""
    curve = tag_scores.precision_curve(found.pairs, int(found.truth.sum()), RECALL)
    frame = pd.DataFrame({"recall": RECALL, "precision": curve})
    note = (
        f"All classes together, each clip's {TOP} best: the best precision at such a recall or more, 0 where they do not "
        "get there."
    )
    return Table("Precision over recall", frame, note, "lines")


def reliability(found: Answers) -> Table:
    """How many of the tags of a score are right."""
    num, total, hits = tag_scores.reliability(found.pairs.score, found.pairs.hit)
    some = num > 0
    mean = total[some] / num[some]
    frame = pd.DataFrame({"score": mean, "share right": hits[some] / num[some], "as it should be": mean})
    note = (
        f"Each clip's {TOP} best tags in bins of equal width; the calibration error is the mean distance of the two lines, "
        f"weighted by the tags of a bin. From the lowest bin on they hold {', '.join(f'{n:.0f}' for n in num[some])} tags."
    )
    return Table("Are the scores probabilities?", frame, note, "lines")


def predictions(found: Answers) -> pd.DataFrame:
    """A row a clip: its tags in words and (`tags`, JSON) by id, what is believed, and `best`: [[id, score], …] in full."""
    frame = pd.DataFrame({"clip": [clip.id for clip in found.clips], "group": [clip.group for clip in found.clips]})
    frame["truth"] = [in_words(found, row) for row in found.truth]
    frame["tags"] = [json.dumps(np.flatnonzero(row).tolist()) for row in found.truth]
    frame["answer"] = [in_words(found, row) for row in found.believed]
    shape = len(found.clips), -1
    best = zip(found.pairs.label.reshape(shape).tolist(), found.pairs.score.reshape(shape).tolist(), strict=True)
    frame["best"] = [json.dumps(list(zip(tags, scores, strict=True))) for tags, scores in best]
    return frame


def in_words(found: Answers, tags: np.ndarray) -> str:
    """Names of (C,) bool."""
    return " · ".join(found.labels[tag] for tag in np.flatnonzero(tags)) or "none"


def timelines(run: Evaluation, found: Answers) -> Table | None:
    """When which tags are believed, of some clips that the tagger saw in segments; None where it did not."""
    every = run.predict("tagger", "test")
    if answers.SEGMENTS[0] not in every:
        return None
    rows = np.linspace(0, len(found.clips) - 1, min(NUM_TIMELINES, len(found.clips))).astype(int)
    names = {name: every[name][rows] for name in answers.SEGMENTS}
    parts = [
        answers.timeline(found.clips[row].id, answers.segments(names, i, found.labels), run.facts).frame
        for i, row in enumerate(rows)
    ]
    note = "Tags of parts of a clip from their thresholds on; parts that follow each other are joined."
    return Table("Timelines", pd.concat(parts, ignore_index=True), note, "timeline")


def examples(found: Answers) -> list[Example]:
    """Clips to look at, all of whose tags are right or not: what is believed together, and then the best tags."""
    believed = found.believed
    right = (believed == found.truth).all(axis=1)
    sure = np.exp(np.log(np.maximum(np.where(believed, found.scores, 1 - found.scores), 1e-300)).sum(axis=1))
    shown = []
    for row in scoring.choose_examples(right, sure):
        best = tag_scores.best_tags(found.scores[row : row + 1], NUM_NAMED)[0]
        listed = [(in_words(found, believed[row]), float(sure[row]))]
        single = [(found.labels[tag], float(found.scores[row, tag])) for tag in best]
        listed += single if believed[row].sum() != 1 else [one for one in single if one[0] != listed[0][0]]
        shown.append(Example(found.clips[row].id, in_words(found, found.truth[row]), listed))
    return shown
