from __future__ import annotations

import functools
import hashlib
import http.server
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.numpy import load_file as load_numpy
from transformers import ViTConfig, ViTModel

from models.family import InputError
from tasks.pretrained import load_state

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=16))
    folder = tmp_path_factory.mktemp("vit")
    model.save_pretrained(folder)
    return folder, {key: torch.from_numpy(value) for key, value in load_numpy(folder / "model.safetensors").items()}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_equal(state, expected) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_folder_as_transformers_writes_it(vit, capsys: pytest.CaptureFixture[str]) -> None:
    folder, expected = vit
    state, kind = load_state(str(folder))
    assert_equal(state, expected)
    assert kind == f"{folder}@{hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()[:12]}"
    assert "licence" in capsys.readouterr().out


def test_shards(vit, tmp_path: Path) -> None:
    folder, expected = vit
    ViTModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_equal(load_state(str(tmp_path / "shards"))[0], expected)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_bin_file_of_tensors(vit, tmp_path: Path, wrapper: str | None) -> None:
    _, expected = vit
    torch.save({wrapper: expected, "epoch": 3} if wrapper else expected, tmp_path / "pytorch_model.bin")
    assert_equal(load_state(str(tmp_path))[0], expected)


class Marker:
    """Unpickled, it leaves a file: proof that code would have run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Marker(marker)))
    assert marker.exists()  # the attack works on a plain pickle load
    marker.unlink()
    torch.save({"weight": torch.ones(1), "evil": Marker(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="refused"):
        load_state(str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_file_is_named(vit, tmp_path: Path, name: str) -> None:
    folder, expected = vit
    torch.save(expected, tmp_path / "whole.bin")
    whole = folder / "model.safetensors" if name == "model.safetensors" else tmp_path / "whole.bin"
    (tmp_path / name).write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(InputError, match=name):
        load_state(str(tmp_path / name))


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_state("./nowhere")
    with pytest.raises(InputError, match="in this folder"):
        load_state(str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        load_state("someone/something")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached"):
        load_state("someone/something")


class Hub(http.server.SimpleHTTPRequestHandler):
    """The part of the hub's protocol that a download needs."""

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.replace("/someone/vit/resolve/main", "").replace(f"/{'c' * 40}", ""))

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", '"0123456789"')
        super().end_headers()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(vit) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=str(vit[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_hub_then_cache(vit, hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    fetched, kind = load_state("someone/vit")
    assert_equal(fetched, vit[1])
    assert "from the Hugging Face hub" in capsys.readouterr().out
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    cached, same = load_state("someone/vit")
    assert_equal(cached, vit[1])
    assert same == kind
    assert "from the Hugging Face cache" in capsys.readouterr().out
