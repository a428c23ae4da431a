"""Make a version the champion if it proves itself: `python -m tasks.promote FAMILY [--version N]`.

It becomes champion when the 95 % interval of its headline metric minus the champion's, bootstrapped over the same test
clips with those of one source video drawn together, lies nowhere below `min_gain` (0: surely not worse).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

import models
from models import metrics
from models.family import InputError
from tasks import command, params, storage, tracking, versions
from tasks.versions import Version


@dataclass(frozen=True)
class Promote:
    """Section `promote` of params.yaml."""

    min_gain: float  # of the headline metric, in its own unit; below 0: how much worse it may be
    num_bootstrap: int
    seed: int


@dataclass(frozen=True)
class Difference:
    """A candidate against a champion on the same clips."""

    metric: str
    candidate: float
    champion: float
    low: float  # 95 % interval of candidate - champion
    high: float
    num_clips: int

    def __str__(self) -> str:
        """Both numbers, their difference and its interval."""
        gain = self.candidate - self.champion
        return (
            f"{self.metric} {self.candidate:.4f} against {self.champion:.4f}, difference {gain:+.4f} "
            f"(95 % interval {self.low:+.4f} to {self.high:+.4f}, {self.num_clips} clips)"
        )


@dataclass(frozen=True)
class Decision:
    """What the gate said."""

    candidate: Version
    champion: Version  # as it was before
    difference: Difference
    min_gain: float

    @property
    def promoted(self) -> bool:
        """Whether the candidate is the champion now."""
        return self.difference.low >= self.min_gain

    def __str__(self) -> str:
        """One line."""
        what = "is the champion now" if self.promoted else f"is not promoted, version {self.champion.number} stays"
        return f"{self.candidate} {what}: {self.difference}; asked: no less than {self.min_gain:+g}"


def main() -> None:
    """Decide, move the alias, say why."""
    parser = argparse.ArgumentParser(prog="python -m tasks.promote", description="Let a version become the champion.")
    parser.add_argument("family", choices=models.names())
    parser.add_argument("--version", type=int, help="the candidate by default")
    given = parser.parse_args()
    command.say(f"promote: {promote(given.family, given.version, params.stage(Promote, 'promote'), 'command line')}")


def promote(family: str, number: int | None, gate: Promote, by: str) -> Decision:
    """Compare a version (None: the candidate) with the champion; move the alias if it passes; keep the result as tags."""
    name = f"duet-{family}"
    with storage.alone(f"promote@{family}"):
        candidate = versions.find(f"models:/{name}@candidate" if number is None else f"models:/{name}/{number}")
        champion = versions.find(f"models:/{name}@champion")
        if candidate.number == champion.number:
            raise InputError(f"{candidate} is the champion already; register another version, or name one")
        decision = Decision(candidate, champion, compare(family, candidate, champion, gate), gate.min_gain)
        versions.tag(candidate, _tags(decision, by))
        if decision.promoted:
            tracking.set_alias(name, "champion", candidate.number)
    return decision


def compare(family: str, candidate: Version, champion: Version, gate: Promote) -> Difference:
    """The headline metric of both on the same test clips; InputError when they were not scored on the same."""
    asked, given = (version.tags.get("duet.evaluation_data", "none") for version in (champion, candidate))
    if asked != given:
        raise InputError(
            f"{candidate} was scored on other evaluation data than {champion} ({given[:12]}, {asked[:12]}); "
            "evaluate both on one test split and register them again"
        )
    tables = [versions.predictions(version) for version in (candidate, champion)]
    if not tables[0][["clip", "group"]].equals(tables[1][["clip", "group"]]):
        raise InputError(
            f"{candidate} answered {len(tables[0])} clips and {champion} {len(tables[1])}, not the same ones; "
            "evaluate both on the same stores and register them again"
        )
    metric, statistic = models.load(family).headline
    ours, theirs = (statistic(table) for table in tables)
    low, high = metrics.bootstrap(
        lambda weights: ours(weights) - theirs(weights), tables[0]["group"].tolist(), gate.num_bootstrap, gate.seed
    )
    once = np.ones((1, len(tables[0])))
    return Difference(metric, float(ours(once)[0]), float(theirs(once)[0]), low, high, len(tables[0]))


def _tags(decision: Decision, by: str) -> dict[str, str]:
    difference = decision.difference
    return {
        "promotion": "promoted" if decision.promoted else "not promoted",
        "promotion.by": by,
        "promotion.against": str(decision.champion.number),
        "promotion.metric": difference.metric,
        "promotion.difference": f"{difference.candidate - difference.champion:+.6f}",
        "promotion.low": f"{difference.low:+.6f}",
        "promotion.high": f"{difference.high:+.6f}",
        "promotion.min_gain": f"{decision.min_gain:+g}",
    }


if __name__ == "__main__":
    command.run(main)
