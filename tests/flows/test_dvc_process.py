"""The process side: lines, the guard, one DVC stage."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from models.family import InputError
from tasks import dvc_process, graph
from tasks.dvc_process import LineFeed, StageFailed, StageUnlucky, Stopped


def test_lines_are_whole_progress_is_thinned_and_floods_are_counted() -> None:
    seen: list[str] = []
    feed = LineFeed(seen.append)
    feed.feed(b"one\ntw")
    feed.feed(b"o\r\n")
    for i in range(100):
        feed.feed(b"%d%%\r" % i)
    feed.feed(b"".join(b"flood %d\n" % i for i in range(200)) + b"end without newline")
    feed.close()
    assert seen[:2] == ["one", "two"]
    assert sum(line.endswith("%") for line in seen) == 1
    assert seen[-1] == "… 153 lines more, in the log file"
    assert feed.tail[-1] == "end without newline"


@pytest.mark.slow
def test_what_a_stage_did(toy: Any) -> None:
    run = lambda **options: dvc_process.reproduce(  # noqa: E731
        "first", toy.root, lambda line: None, threading.Event(), log=toy.root / ".duet/log", **options
    )
    assert run() == "ran"
    assert run() == "unchanged"
    assert run(force=True) == "ran"
    params = (toy.root / "params.yaml").read_text()
    (toy.root / "params.yaml").write_text(params.replace("value: 1", "value: 2"))
    assert run() == "ran"
    (toy.root / "params.yaml").write_text(params)
    assert run() == "cached"
    assert (toy.root / "first.txt").read_text() == "first 1\n"


@pytest.mark.parametrize(
    ("printed", "kind"),
    [
        ("KeyError: 'label'", StageFailed),
        ("ConnectionResetError: peer", StageUnlucky),
        ("HTTP Error 503", StageUnlucky),
    ],
)
def test_only_infrastructure_is_worth_another_try(toy: Any, printed: str, kind: type[Exception]) -> None:
    (toy.root / "bad.py").write_text(f"import sys; sys.exit({printed!r})")
    toy.graph("stages:\n  bad:\n    cmd: python bad.py\n    outs: [x.txt]\n")
    with pytest.raises(StageFailed, match="failed to reproduce") as caught:
        dvc_process.reproduce("bad", toy.root, print, threading.Event(), log=toy.root / ".duet/log")
    assert type(caught.value) is kind


def test_a_stage_past_its_timeout_ends(toy: Any) -> None:
    toy.graph("stages:\n  long:\n    cmd: sleep 1234.6\n    outs: [x.txt]\n")
    with pytest.raises(StageFailed, match="timeout"):
        dvc_process.reproduce("long", toy.root, print, threading.Event(), log=toy.root / ".duet/log", timeout=2)
    assert not toy.processes()


@pytest.mark.parametrize("chatty", [False, True])
def test_stopping_saves_and_leaves_nothing(toy: Any, chatty: bool) -> None:
    toy.slow(chatty)
    stop, caught = threading.Event(), []

    def work() -> None:
        try:
            dvc_process.reproduce("slow", toy.root, lambda line: None, stop, log=toy.root / ".duet/log")
        except Stopped as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    toy.wait_for("started.bin")
    began = time.monotonic()
    stop.set()
    thread.join()
    assert time.monotonic() - began < 10
    assert caught
    assert (toy.root / "saved.bin").exists()
    assert not toy.processes()
    assert toy.is_unlocked()


@pytest.mark.slow
def test_killing_the_asker_ends_the_stage(toy: Any) -> None:
    toy.slow(chatty=False)
    code = (
        "import threading; from pathlib import Path; from tasks import dvc_process;"
        f"dvc_process.reproduce('slow', Path({str(toy.root)!r}), print, threading.Event(), log=Path('log'))"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], cwd=toy.root, stdout=subprocess.DEVNULL)
    toy.wait_for("started.bin")
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    toy.wait_for("saved.bin")
    toy.wait_until_idle()
    assert toy.is_unlocked()


def test_state(toy: Any) -> None:
    needs, changed = dvc_process.read_state(toy.root)
    assert changed == set(needs)
    toy.dvc("repro")
    assert dvc_process.read_state(toy.root) == (needs, set())
    (toy.root / "fan_b.txt").write_text("else")
    assert dvc_process.read_state(toy.root) == (needs, {"fan@b", "grid@s", "grid@l", "score"})
    listed = {line.split()[0] for line in toy.dvc("stage", "list", "--name-only").splitlines()}
    assert needs.keys() == listed
    assert len(needs) == 10
    assert needs["grid@s"] == ["fan@a", "fan@b"]
    order = list(needs)
    assert all(order.index(need) < order.index(stage) for stage in needs for need in needs[stage])
    with pytest.raises(InputError, match="wait for each other"):
        dvc_process.parse_dot('"a" -> "b";\n"b" -> "a";')
    (toy.root / "dvc.yaml").write_text("stages: {first: {outs: [x]}}")
    with pytest.raises(InputError, match=r"dvc status: .*dvc.yaml"):
        dvc_process.read_state(toy.root)


@pytest.mark.slow
def test_six_at_once_keep_their_lock_entries(toy: Any) -> None:
    toy.dvc("repro", "-q", "first")
    answers: list[str] = []

    def work(item: str) -> None:
        answers.append(
            dvc_process.reproduce(
                f"fan@{item}", toy.root, lambda line: None, threading.Event(), log=toy.root / ".duet/log"
            )
        )

    threads = [threading.Thread(target=work, args=[item]) for item in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["ran"] * 6
    assert {f"fan@{item}" for item in "abcdef"} <= graph.stages(toy.root / "dvc.lock").keys()
