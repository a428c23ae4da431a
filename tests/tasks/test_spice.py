"""The Java program of SPICE, played by a small one that is compiled here."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest

from models.family import InputError
from tasks import spice as stage
from tasks.spice import spice

# Gives every clip 0.25 and the second one null, and fails where a caption says so.
SOURCE = r"""
import java.nio.file.*; import java.util.regex.*;
public class Spice {
  public static void main(String[] a) throws Exception {
    String text = Files.readString(Path.of(a[0]));
    if (text.contains("explode")) { System.err.println("Error: Could not parse"); System.exit(3); }
    if (text.contains("mumble")) { Files.writeString(Path.of(a[2]), "[{\"id\": 1}]"); return; }
    Matcher m = Pattern.compile("\"image_id\": (\"[^\"]*\"), \"test\": \"[^\"]*\", \"refs\": \\[\"").matcher(text);
    StringBuilder out = new StringBuilder("["); int n = 0;
    while (m.find()) out.append(n > 0 ? "," : "").append("{\"image_id\": " + m.group(1)
      + ", \"scores\": {\"All\": {\"f\": " + (n++ == 1 ? "null" : "0.25") + "}}}");
    if (!a[1].equals("-out")) System.exit(4);
    Files.writeString(Path.of(a[2]), out + "]");
  }
}
"""


@pytest.fixture(scope="module")
def jar(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not all(shutil.which(program) for program in ("java", "javac", "jar")):
        pytest.skip("no Java compiler on this machine")
    folder = tmp_path_factory.mktemp("jar")
    (folder / "Spice.java").write_text(SOURCE)
    subprocess.run(["javac", "Spice.java"], cwd=folder, check=True)
    subprocess.run(["jar", "cfe", "spice.jar", "Spice", "Spice.class"], cwd=folder, check=True)
    return str(folder / "spice.jar")


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MEMORY", "64M")


def test_scores_come_by_clip(jar: str) -> None:
    found = spice(jar, {"a": "a man", "b": "it", "c": "a dog"}, {"a": ["a man"], "b": ["x", "y"], "c": ["dogs"]})
    assert list(found) == ["a", "b", "c"]
    assert found["a"] == found["c"] == 0.25
    assert math.isnan(found["b"])


def test_a_failure_is_told_with_what_java_said(jar: str) -> None:
    with pytest.raises(InputError, match="java ended with 3: Error: Could not parse"):
        spice(jar, {"a": "explode"}, {"a": ["a man"]})


def test_an_answer_of_another_program_is_refused(jar: str) -> None:
    with pytest.raises(InputError, match=r"not that of spice-1\.0\.jar"):
        spice(jar, {"a": "mumble"}, {"a": ["a man"]})


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(InputError, match="needs Java"):
        spice("spice.jar", {}, {})
    monkeypatch.setattr(shutil, "which", lambda program: "/bin/true")
    with pytest.raises(InputError, match="no such file"):
        spice(str(tmp_path / "spice.jar"), {}, {})
