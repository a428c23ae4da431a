"""What a phase leaves behind, and what stands in it when it is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.family import InputError
from tasks import bundle

Write = Callable[..., Path]


def test_round_trip(tmp_path: Path, write_bundle: Write) -> None:
    found = bundle.load(write_bundle(tmp_path / "finetune"))
    module = found.module()
    assert (found.family, found.phase, found.facts.labels["label"][1]) == ("t3av", "finetune", "dog barking")
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert all(torch.equal(value, found.state[key]) for key, value in module.state_dict().items())


def test_same_run_same_bytes(tmp_path: Path, write_bundle: Write) -> None:
    first, second = write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b")
    for name in (bundle.WEIGHTS, bundle.META, bundle.HISTORY):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert sorted(path.name for path in first.iterdir()) == ["bundle.json", "history.csv", "weights.safetensors"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (bundle.WEIGHTS, "half"),
        (bundle.WEIGHTS, ""),
        (bundle.WEIGHTS, None),
        (bundle.META, "half"),
        (bundle.META, "[]"),
        (bundle.META, "{}"),
        (bundle.META, None),
    ],
)
def test_damage_is_one_line_that_names_the_file(
    tmp_path: Path, write_bundle: Write, name: str, content: str | None
) -> None:
    folder = write_bundle(tmp_path / "finetune")
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(data[: len(data) // 2] if content == "half" else content.encode())
    with pytest.raises(InputError) as error:
        bundle.load(folder)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_architecture_are_refused(tmp_path: Path, write_bundle: Write) -> None:
    folder, other = write_bundle(tmp_path / "finetune"), write_bundle(tmp_path / "pretrain", phase="pretrain")
    (folder / bundle.WEIGHTS).write_bytes((other / bundle.WEIGHTS).read_bytes())
    with pytest.raises(InputError, match="another architecture"):
        bundle.load(folder).module()


@pytest.mark.parametrize(("key", "value"), [("phase", "sing"), ("family", "nobody"), ("facts", {"label": []})])
def test_a_foreign_bundle_is_one_line(tmp_path: Path, write_bundle: Write, key: str, value: object) -> None:
    folder = write_bundle(tmp_path / "finetune")
    meta = json.loads((folder / bundle.META).read_text())
    (folder / bundle.META).write_text(json.dumps(meta | {key: value}))
    with pytest.raises(InputError, match=r"bundle\.json") as error:
        bundle.load(folder)
    assert "\n" not in str(error.value)


def test_a_config_of_another_version_names_the_key(tmp_path: Path, write_bundle: Write) -> None:
    folder = write_bundle(tmp_path / "finetune")
    meta = json.loads((folder / bundle.META).read_text())
    meta["config"]["clf_width"] = meta["config"].pop("clf_hidden_dim")
    (folder / bundle.META).write_text(json.dumps(meta))
    with pytest.raises(InputError, match="clf_width") as error:
        bundle.load(folder)
    assert "\n" not in str(error.value)
