"""The report page, read as a browser would: what it shows, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch
from PIL import Image

from models.family import Attention, Example, Results, Table
from tasks import params, report, storage
from tasks.data.frame_store import FrameStore
from tasks.evaluate import Evaluate, Scored, write_tables
from tests.tasks.toy_evaluation import EVALUATE, FRAMES, LABELS, TEST, clip_ids, write_project

STORES = Path("data/sounds/stores")


class Page(HTMLParser):
    """The tags of a page, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += [data.strip()] if data.strip() and self.tags[-1] != "style" else []

    def pictures(self) -> list[bytes]:
        """The pictures of the page."""
        found = [value for name, value in self.attributes if name == "src"]
        assert all(re.match(r"data:image/(png|jpeg);base64,", value) for value in found)
        return [base64.b64decode(value.partition(",")[2], validate=True) for value in found]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scored, Results, Path]]:
    """An evaluation and the folder of its report; its project is the current folder meanwhile. Training was silent."""
    root = tmp_path_factory.mktemp("written")
    write_project(root, silent=[*clip_ids("train"), "test_03"], blind=["test_07"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        scored = Scored("t3av", params.typed(Evaluate, EVALUATE, "evaluate"), torch.device("cpu"))
        results = scored.family.evaluate(scored)
        (root / "out").mkdir()
        write_tables(results, root / "out")
        report.write(scored, results, root / "out")
        yield scored, results, root / "out"


@pytest.fixture(scope="module")
def page(written: tuple[Scored, Results, Path]) -> Page:
    return Page((written[2] / "report.html").read_text())


def test_it_needs_no_other_file(page: Page, written: tuple[Scored, Results, Path]) -> None:
    assert len(page.pictures()) > 5
    links = [value for name, value in page.attributes if name in ("href", "srcset", "data", "action", "poster")]
    assert not [link for link in links if not link.startswith("#")]
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?:", (written[2] / "report.html").read_text())


def test_every_picture_opens(page: Page) -> None:
    for picture in page.pictures():
        with Image.open(io.BytesIO(picture)) as image:
            image.load()
            assert image.width > 40


def test_names_of_classes_are_text(page: Page, written: tuple[Scored, Results, Path]) -> None:
    for label in LABELS:
        assert label in page.text
    source = (written[2] / "report.html").read_text()
    assert "dog &lt;b&gt;barking&lt;/b&gt;" in source
    assert page.tags.count("b") == len(report.headline(written[1].metrics))  # one a card, none out of a label


def test_cards_bear_names_that_people_use(page: Page, written: tuple[Scored, Results, Path]) -> None:
    m = written[1].metrics
    for name, key in {
        "Top-1 accuracy": "top1",
        "Top-1 accuracy, audio only": "audio_top1",
        "Top-1 accuracy, video only": "video_top1",
        "Macro-F1": "macro_f1",
    }.items():
        place = page.text.index(name)
        low, high = (f"{100 * m[f'{key}_{end}']:.1f}" for end in ("low", "high"))
        assert page.text[place + 1 : place + 3] == [f"{100 * m[key]:.1f} %", f"{low} – {high}"]
    assert not [text for text in page.text if re.search(r"top1|top5|macro_f1|balanced_accuracy|_v2a", text)]


def test_tables_are_those_of_the_csv_files(page: Page, written: tuple[Scored, Results, Path]) -> None:
    for name in ("modalities", "per_class", "retrieval"):
        table = pd.read_csv(written[2] / "plots" / f"{name}.csv")
        place = page.text.index(table.columns[-1], page.text.index(written[1].tables[name].title))
        cells = page.text[place + 1 : place + 1 + table.size]
        for cell, value in zip(cells, table.to_numpy().ravel(), strict=True):
            assert cell == value if isinstance(value, str) else float(cell) == pytest.approx(value, abs=0.051)


def test_what_could_not_be_measured_is_a_dash(page: Page, written: tuple[Scored, Results, Path]) -> None:
    assert "probe_a" not in written[1].metrics  # no train clip has sound
    place = page.text.index("linear probe, audio")
    assert page.text[place + 1 : place + 4] == ["–"] * 3
    assert "–" not in page.text[page.text.index("linear probe, video") + 1]
    assert not re.search(r"\bnan\b", " ".join(page.text), re.IGNORECASE)


def test_provenance(page: Page, written: tuple[Scored, Results, Path]) -> None:
    text = " ".join(page.text)
    assert f"sounds: 16 train, 2 val, {TEST} test" in text
    assert "in quarantine 2 clips" in text
    for phase in ("pretrain", "contrastive", "finetune"):
        assert storage.file_digest(Path("artifacts/t3av") / phase / "weights.safetensors") in text
        assert f"training curves of {phase}" in dict.fromkeys(value for _, value in page.attributes)


def test_same_results_same_bytes(written: tuple[Scored, Results, Path], tmp_path: Path) -> None:
    scored, results, folder = written
    (tmp_path / "plots").mkdir()
    report.write(scored, results, tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(files) > 5
    assert all((tmp_path / file).read_bytes() == (folder / file).read_bytes() for file in files)


def test_examples_show_frames_and_sound(written: tuple[Scored, Results, Path]) -> None:
    clips = ["test_00", "test_03", "test_07"]
    whole, silent, blind = report.gallery([Example(clip, "rain", [("rain", 0.91234)]) for clip in clips], STORES, 3.0)
    assert whole["right"]
    assert whole["bars"] == [("rain", 91.2)]
    strip = simplejpeg.decode_jpeg(base64.b64decode(whole["film"].partition(",")[2]))
    frames = FrameStore(STORES).decode("test_00", range(FRAMES))
    assert strip.shape == (16, FRAMES * 24, 3)
    errors = [
        [np.abs(strip[:, place * 24 : (place + 1) * 24] - frame.astype(float)).mean() for frame in frames]
        for place in range(FRAMES)
    ]
    assert np.argmin(errors, axis=1).tolist() == list(range(FRAMES))  # each picture in its place
    assert np.diagonal(errors).max() < 5
    assert whole["sound"]
    assert silent["film"]
    assert not silent["sound"]
    assert not blind["film"]
    assert blind["sound"]


def test_examples_show_what_was_looked_at(written: tuple[Scored, Results, Path]) -> None:
    seen, heard = np.zeros((2, 2, 2), np.float32), np.zeros((4, 6), np.float32)
    seen[0, :, 0] = seen[1, :, 1] = heard[:, 0] = 1  # the left at first, then the right; the beginning of the sound
    (plain,) = report.gallery([Example("test_00", "rain", [("rain", 1.0)])], STORES, 0.5)
    (shown,) = report.gallery([Example("test_00", "rain", [("rain", 1.0)], seen, heard)], STORES, 0.5)
    strip = simplejpeg.decode_jpeg(base64.b64decode(shown["film"].partition(",")[2])).astype(int)
    assert strip.shape == (32, FRAMES * 24, 3)
    orange = strip[16:, :, 0] - strip[16:, :, 2]  # red less blue: nothing where the picture stays grey
    for frame, (hot, cold) in ((0, (slice(4, 9), slice(15, 20))), (FRAMES - 1, (slice(15, 20), slice(4, 9)))):
        part = orange[:, frame * 24 : (frame + 1) * 24]
        assert part[:, hot].mean() > 80 > 20 > abs(part[:, cold].mean())
        assert abs(part[:, :3].mean()) < 20, "the model saw the middle square alone"
    assert shown["sound"] != plain["sound"]


def test_examples_show_what_each_word_was_taken_from(written: tuple[Scored, Results, Path]) -> None:
    """The first word was seen in the last frame, the second heard in the first half: blue there, white elsewhere."""
    video, audio = np.zeros((2, 4), np.float32), np.zeros((2, 2), np.float32)
    video[0, 3] = audio[1, 0] = 1
    shown = Example("test_00", "rain", [("rain", 1.0)], attention=Attention(["it", "rains"], video, audio))
    (found,) = report.gallery([shown], STORES, 0.5)
    with Image.open(io.BytesIO(base64.b64decode(found["attention"].partition(",")[2]))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 80  # the darkest of the scale
    rows, columns = np.nonzero(blue)
    upper = rows < (rows.min() + rows.max()) / 2
    assert columns[upper].mean() < columns[~upper].mean(), "frames stand left of the sound"
    assert len(set(columns[upper])) < len(set(columns[~upper])), "a quarter of the frames, half of the sound"


def test_a_tone_stands_at_its_pitch() -> None:
    """The brightest row of the spectrogram's picture moves up with the pitch."""
    rows = []
    for pitch in (500, 1500, 5000):
        wave = np.sin(2 * np.pi * pitch / 16000 * np.arange(16000)).astype(np.float32)
        with Image.open(io.BytesIO(report.spectrogram(wave, 16000))) as image:
            pixels = np.asarray(image.convert("RGB")).astype(float)
        column = pixels[:, pixels.shape[1] // 2].sum(1)  # through the middle of the plot, white around it
        top = int(np.argmax(column < 760))
        height = int(np.argmax(column[top:] > 760))
        rows.append(top + int(np.argmax(column[top : top + height - 3])))  # the frame below is bright, too
    assert rows[0] > rows[1] > rows[2]
    assert report.spectrogram(np.zeros(100, np.float32), 16000) == b""


def test_worst_pairs_against_a_loop() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (6, 6))
    names = [f"class {i}" for i in range(6)]
    table = pd.DataFrame(counts, columns=names)
    table.insert(0, "truth", names)
    found = report.worst_pairs(table)
    pairs = [(counts[i, j], names[i], names[j], counts[i].sum()) for i in range(6) for j in range(6) if i != j]
    expected = sorted((pair for pair in pairs if pair[0]), key=lambda pair: -pair[0])[: report.MAX_CONFUSIONS]
    assert found["clips"].tolist() == [pair[0] for pair in expected]
    for row in found.itertuples(index=False):
        assert (row[2], row[0], row[1], row[3]) in pairs
    right = pd.DataFrame(np.diag(counts.diagonal()), columns=names)
    right.insert(0, "truth", names)
    assert report.worst_pairs(right).empty


def test_a_long_table_says_what_it_leaves_out() -> None:
    table = Table("Long", pd.DataFrame({"class": [f"c{i}" for i in range(50)], "F1": np.linspace(0, 1, 50)}))
    section = report.section("long", table, b"")
    assert len(section["rows"]) == 40
    assert section["hidden"] == 10
    assert section["numeric"] == [False, True]
    assert section["rows"][0] == ("c0", "0.000")


def test_a_page_without_examples(written: tuple[Scored, Results, Path], tmp_path: Path) -> None:
    scored, results, folder = written
    (tmp_path / "plots").mkdir()
    report.write(scored, replace(results, examples=[]), tmp_path)
    assert 'id="examples"' in (folder / "report.html").read_text()
    assert 'id="examples"' not in (tmp_path / "report.html").read_text()


def test_a_timeline_shows_each_segment_in_its_place() -> None:
    """Truth on the left in the upper half, a detection on the right in the lower one, and of two the surer is darker."""
    rows = [("truth", 10.0, 30.0, 1.0), ("found", 50.0, 70.0, 0.9), ("found", 75.0, 95.0, 0.1)]
    frame = pd.DataFrame(rows, columns=["kind", "start", "end", "score"])
    frame = frame.assign(clip="a $strange$ <name>", duration=100.0, label="to $jump")
    with Image.open(io.BytesIO(report.draw(Table("Time", frame, plot="timeline")))) as image:
        pixels = np.asarray(image.convert("L")).astype(float)[40:]  # below the legend
    left, right = (np.flatnonzero((pixels < 200).sum(0) > 8)[k] for k in (0, -1))  # the axis and the last bar's end
    scale = (right - left) / 95
    upper, pale, sure = (pixels[:, round(left + scale * middle)] for middle in (20, 85, 60))
    assert upper.min() < sure.min() < pale.min() < 240
    assert np.argmax(upper < 200) < np.argmax(sure < 200)
    assert pixels[:, round(left + scale * 40)].min() > np.minimum(pale, sure).min(), "nothing stands between them"
    section = report.section("time", Table("Time", frame, plot="timeline"), b"x")
    assert (section["rows"], section["picture"] != "") == ([], True)
    alone = report.draw(Table("Time", frame[frame["kind"] == "found"], plot="timeline"))
    assert alone.startswith(b"\x89PNG")


def test_a_timeline_without_a_segment_says_so() -> None:
    row = {"clip": "c", "duration": 100.0, "kind": "nothing", "label": "", "start": 0.0, "end": 0.0, "score": 0.0}
    with Image.open(io.BytesIO(report.draw(Table("Time", pd.DataFrame([row]), plot="timeline")))) as image:
        pixels = np.asarray(image.convert("L"))
    middle = pixels[:, pixels.shape[1] * 45 // 100 : pixels.shape[1] * 55 // 100]
    assert (middle < 128).any()
    full = pd.DataFrame([row, {**row, "clip": "d", "kind": "found", "label": "run", "end": 50.0, "score": 0.9}])
    assert report.draw(Table("Time", full, plot="timeline")).startswith(b"\x89PNG")


@pytest.mark.parametrize("classes", [3, 60])
@pytest.mark.parametrize("kind", ["confusion", "bars", "lines"])
def test_every_kind_of_plot_takes_awkward_tables(kind: str, classes: int) -> None:
    names = ["<b>a</b>, $x$", *(f"class {i}" for i in range(classes - 1))]
    values = np.random.default_rng(1).integers(0, 5, (classes, classes)).astype(float)
    if kind == "confusion":
        values[0] = 0  # a class without clips
    else:
        values = values[:, :3] / 5
        values[:, 1] = np.nan  # a score that could not be had
    if kind == "bars" and classes > 40:
        values = np.full_like(values, np.nan)
    frame = pd.DataFrame(values, columns=names[: values.shape[1]])
    frame.insert(0, "truth", range(classes) if kind == "lines" else names)
    picture = report.draw(Table("Any", frame, plot=kind))  # type: ignore[arg-type]
    assert picture.startswith(b"\x89PNG")
