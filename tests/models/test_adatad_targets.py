"""Assignment by hand and by loops, losses against torchvision and closed forms, and the way back to segments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import distance_box_iou_loss, sigmoid_focal_loss

from models.adatad import targets
from models.adatad.targets import Points, Targets

WINDOW, LEVELS, RADIUS = 32, 3, 1.5
AT = targets.points(WINDOW, LEVELS)  # strides 1, 2, 4; ranges 0-4, 4-8, 8-
Found = dict[tuple[int, int], tuple[set[int], tuple[float, float]]]


def assign(segments: list[tuple[float, float]], classes: list[int], length: int = WINDOW) -> Found:
    """(stride, position) of each positive point -> its classes and its segment."""
    mask = torch.arange(WINDOW)[None] < length
    found = targets.assign(AT, torch.tensor([segments]), torch.tensor([classes]), mask, 4, RADIUS)
    back = targets.decode(AT, found.offsets)
    assert not found.classes[~found.positive].any()
    return {
        (int(AT.strides[p]), int(AT.positions[p])): (
            set(found.classes[0, p].nonzero().flatten().tolist()),
            (back[0, p, 0].item(), back[0, p, 1].item()),
        )
        for p in found.positive[0].nonzero().flatten().tolist()
    }


# --- points --------------------------------------------------------------------------------------------------------------


def test_points_of_the_published_window() -> None:
    at = targets.points(768, 6)
    assert len(at.positions) == 1512
    assert [int((at.strides == 2**level).sum()) for level in range(6)] == [768, 384, 192, 96, 48, 24]
    ranges = [at.ranges[at.strides == 2**level].unique(dim=0).tolist() for level in range(6)]
    assert ranges == [[[0, 4]], [[4, 8]], [[8, 16]], [[16, 32]], [[32, 64]], [[64, math.inf]]]
    last = at.positions[at.strides == 32]
    assert last.tolist() == list(range(0, 768, 32)), "no half offset"


def test_one_level_is_open() -> None:
    assert targets.points(4, 1).ranges.tolist() == 4 * [[0.0, math.inf]]


# --- assignment ----------------------------------------------------------------------------------------------------------


def test_a_segment_by_hand() -> None:
    """Centre 5.5. Stride 1: 4 and 7 are 1.5 off, not less. Points 5 and 6 are 4 from a border: both levels' range."""
    segment = (2.0, 9.0)
    expected = {(1, 5), (1, 6), (2, 4), (2, 6), (2, 8)}
    assert assign([segment], [1]) == {point: ({1}, segment) for point in expected}


def test_a_point_on_a_border_is_outside() -> None:
    assert assign([(4.0, 7.0)], [0]).keys() == {(1, 5), (1, 6)}
    assert assign([(4.0, 5.0)], [0]) == {}, "no point lies within"
    assert assign([(4.0, 5.01)], [0]).keys() == {(1, 5)}


def test_the_last_level_is_open() -> None:
    assert assign([(0.0, 32.0)], [3]).keys() == {(4, 12), (4, 16), (4, 20)}


def test_the_shorter_segment_wins() -> None:
    long, short = (2.0, 9.0), (4.0, 8.0)
    for segments, classes in (([long, short], [1, 0]), ([short, long], [0, 1])):
        found = assign(segments, classes)
        assert found[1, 5] == found[1, 6] == found[1, 7] == ({0}, short)
        assert found[2, 4] == ({1}, long), "there the short one's border lies"


def test_segments_as_short_share_a_point() -> None:
    """Both classes; the borders of the first in order, or of the shortest where lengths differ by less than 0.001."""
    one, other = (4.0, 8.0), (5.0, 9.0)
    assert assign([one, other], [0, 1])[1, 6] == ({0, 1}, one)
    assert assign([other, one], [1, 0])[1, 6] == ({0, 1}, other)
    assert assign([one, one], [0, 2])[1, 6] == ({0, 2}, one)
    assert assign([one, one], [2, 2])[1, 6] == ({2}, one)
    nearly, longer = (5.0, 9.0005), (5.0, 9.002)
    assert assign([nearly, one], [1, 0])[1, 6] == ({0, 1}, one)
    assert assign([longer, one], [1, 0])[1, 6] == ({0}, one)


def test_one_that_is_as_short_but_no_candidate_shares_nothing() -> None:
    """At 5 the second segment has its border; at 8 the first has its own."""
    found = assign([(4.0, 8.0), (5.0, 9.0)], [0, 1])
    assert found[1, 5][0] == {0} and found[1, 8][0] == {1}


def test_padding_and_masked_points_answer_for_nothing() -> None:
    whole = assign([(2.0, 9.0), (20.0, 26.0)], [1, 2])
    assert assign([(2.0, 9.0), (20.0, 26.0), (5.0, 6.5)], [1, 2, -1]) == whole
    cut = assign([(2.0, 9.0), (20.0, 26.0)], [1, 2], length=23)
    assert cut == {point: value for point, value in whole.items() if point[1] < 23} and len(cut) < len(whole)
    assert assign([(2.0, 9.0)], [-1]) == {}


def by_loops(at: Points, segments: Tensor, classes: Tensor, mask: Tensor) -> Targets:
    """The rules of one window, read aloud."""
    wanted = Targets(
        torch.zeros(len(at.positions), 4), torch.zeros(len(at.positions), 2), mask.new_zeros(len(at.positions))
    )
    for p, (t, stride, (low, high)) in enumerate(
        zip(at.positions.tolist(), at.strides.tolist(), at.ranges.tolist(), strict=True)
    ):
        candidates = []
        for (start, end), name in zip(segments.tolist(), classes.tolist(), strict=True):
            centre = (start + end) / 2
            inside = max(centre - 1.5 * stride, start) < t < min(centre + 1.5 * stride, end)
            if name >= 0 and mask[int(t)] and inside and low <= max(t - start, end - t) <= high:
                candidates.append((end - start, start, end, name))
        if candidates:
            length, start, end, _ = min(candidates, key=lambda c: c[0])
            wanted.positive[p] = True
            wanted.offsets[p] = torch.tensor([(t - start) / stride, (end - t) / stride])
            for other in candidates:
                if other[0] <= length + 1e-3:
                    wanted.classes[p, other[3]] = 1
    return wanted


def random_windows(num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segments in quarters of a step (exact, and often equal), classes with padding, masks."""
    start = torch.randint(0, 4 * WINDOW, (num, 8)) / 4
    segments = torch.stack([start, (start + torch.randint(1, 80, (num, 8)) / 4).clamp(max=WINDOW)], -1)
    return segments, torch.randint(-1, 4, (num, 8)), torch.arange(WINDOW) < torch.randint(1, WINDOW + 1, (num, 1))


def test_assignment_is_what_loops_find() -> None:
    segments, classes, mask = random_windows(30)
    found = targets.assign(AT, segments, classes, mask, 4, RADIUS)
    assert found.positive.sum() > 100, "the loops would see nothing"
    for row in range(30):
        expected = by_loops(AT, segments[row], classes[row], mask[row])
        assert torch.equal(found.positive[row], expected.positive)
        assert torch.equal(found.classes[row], expected.classes)
        torch.testing.assert_close(found.offsets[row][expected.positive], expected.offsets[expected.positive])
        counted = targets.count_positive(AT, segments[row], classes[row], mask[row], RADIUS)
        assert counted == expected.positive.sum() and counted.dtype == torch.float32


# --- losses --------------------------------------------------------------------------------------------------------------


def test_focal_is_torchvisions_and_its_closed_form() -> None:
    logits, wanted = 4 * torch.randn(5, 7, 3), torch.randint(0, 2, (5, 7, 3)).float()
    torch.testing.assert_close(targets.focal(logits, wanted), sigmoid_focal_loss(logits, wanted))
    p = torch.tensor([0.9, 0.9])
    found = targets.focal(p.logit(), torch.tensor([1.0, 0.0]))
    expected = [-0.25 * 0.1**2 * math.log(0.9), -0.75 * 0.9**2 * math.log(0.1)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_smoothed_targets() -> None:
    found = targets.smooth(torch.tensor([[0.0, 1.0, 0.0]]), 0.2)
    torch.testing.assert_close(found, torch.tensor([[0.05, 0.85, 0.05]]))


def test_distance_iou_is_torchvisions_of_flat_boxes_and_its_closed_form() -> None:
    ours, theirs = 3 * torch.rand(200, 2).double(), 0.1 + 3 * torch.rand(200, 2).double()
    ours[:9, 0], ours[9, :] = 0, 0
    height = 1e-5

    def boxes(offsets: Tensor) -> Tensor:
        zero = torch.zeros(len(offsets)).double()
        return torch.stack([-offsets[:, 0], zero, offsets[:, 1], zero + height], 1)

    expected = distance_box_iou_loss(boxes(ours), boxes(theirs), eps=0.0)
    torch.testing.assert_close(1 - targets.distance_iou(ours, theirs).double(), expected, atol=1e-6, rtol=1e-6)
    # [-1, 1] and [-1, 3]: half of the union, centres 1 apart, 4 enclosed
    value = targets.distance_iou(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]))
    assert value.item() == pytest.approx(0.5 - 1 / 16)


def test_losses_count_what_they_should() -> None:
    segments, classes, mask = random_windows(4)
    found = targets.assign(AT, segments, classes, mask, 4, RADIUS)
    valid = targets.valid(AT, mask)
    logits, offsets = torch.randn(4, len(AT.positions), 4), torch.rand(4, len(AT.positions), 2)
    loss_cls, loss_reg = targets.loss_sums(logits, offsets, valid, found, 0.0)
    torch.testing.assert_close(loss_cls, sigmoid_focal_loss(logits[valid], found.classes[valid], reduction="sum"))
    positive = found.positive
    torch.testing.assert_close(
        loss_reg, (1 - targets.distance_iou(offsets[positive], found.offsets[positive])).sum(), atol=1e-4, rtol=1e-5
    )


def test_empty_answers_have_gradients_that_are_numbers() -> None:
    segments, classes, mask = random_windows(2)
    for names in (classes, torch.full_like(classes, -1)):
        found = targets.assign(AT, segments, names, mask, 4, RADIUS)
        offsets = torch.zeros(2, len(AT.positions), 2, requires_grad=True)
        _, loss = targets.loss_sums(torch.zeros(2, len(AT.positions), 4), offsets, targets.valid(AT, mask), found, 0.0)
        (gradient,) = torch.autograd.grad(loss, offsets)
        assert gradient.isfinite().all() and not gradient[~found.positive].any()
        assert loss.item() >= found.positive.sum(), "an empty segment covers nothing"


# --- answers -------------------------------------------------------------------------------------------------------------


def test_perfect_offsets_give_the_segments_back() -> None:
    segments, classes, mask = random_windows(6)
    found = targets.assign(AT, segments, classes, mask, 4, RADIUS)
    back = targets.decode(AT, found.offsets)
    for row, point in found.positive.nonzero().tolist():
        near = (segments[row] - back[row, point]).abs().amax(1)
        assert near.min() < 1e-4


def test_seconds_lie_within_the_video() -> None:
    batch = {
        "start": torch.tensor([0.0, 12.8]),
        "step": torch.tensor([0.1, 0.2]),
        "duration": torch.tensor([50.0, 15.0]),
    }
    segments = torch.tensor([[[-3.0, 20.0], [5.0, 40.0]], [[-3.0, 5.0], [10.0, 20.0]]])
    expected = [[[0.0, 2.0], [0.5, 4.0]], [[12.2, 13.8], [14.8, 15.0]]]
    torch.testing.assert_close(targets.to_seconds(segments, batch), torch.tensor(expected))


@pytest.mark.parametrize("number", [5, 60])
def test_best_answers_are_those_a_sort_finds(number: int) -> None:
    logits, segments, valid = torch.randn(3, 12, 4), torch.rand(3, 12, 2), torch.rand(3, 12) > 0.2
    found = targets.best_answers(segments, logits, valid, 0.4, number)
    for row in range(3):
        answers = [
            (logits[row, p, c].sigmoid().item(), c, segments[row, p].tolist())
            for p in range(12)
            for c in range(4)
            if valid[row, p] and logits[row, p, c].sigmoid() > 0.4
        ]
        answers = sorted(answers, reverse=True)[:number]
        missing = number - len(answers)
        assert found["scores"][row].tolist() == pytest.approx([a[0] for a in answers] + missing * [0.0])
        assert found["classes"][row].tolist() == [a[1] for a in answers] + missing * [-1]
        torch.testing.assert_close(
            found["segments"][row], torch.tensor([a[2] for a in answers] + missing * [[0.0, 0.0]])
        )
