"""Third-party weights by name: a local folder or file, then the Hugging Face cache, then the hub. No pickle."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.family import InputError, LoadReport, Phase, UnreachableError
from tasks import paddle
from tasks.command import say
from tasks.storage import file_digest

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # in order of preference
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", paddle.SUFFIX)
# Keys under which original repositories keep the weights; the moving average first, which is what they evaluate.
WRAPPERS = ("state_dict_ema", "model", "module", "state_dict", "model_state_dict")
LICENCES = {  # by prefix of the name on the hub
    "MCG-NJU/videomae": "CC-BY-NC-4.0, no commercial use",
    "google/vit": "Apache-2.0",
    "timm/resnet": "BSD-3-Clause (torchvision's weights)",
    "google-bert/": "Apache-2.0",
    "bert-base": "Apache-2.0",
    "openai/clip": "MIT",
    "facebook/vit-mae": "Apache-2.0",
}
TIMEOUT = 5.0  # seconds for the hub to answer at all


def load_state(name: str) -> tuple[Mapping[str, Tensor], str]:
    """The weights called `name` on the CPU, and what they were: the name and the start of the SHA-256 of their bytes.

    `name` is a folder as transformers writes it, a .safetensors / .bin / .pt / .pth / .pdparams file, or a name on the hub
    such as google/vit-base-patch16-224-in21k. HF_HUB_OFFLINE=1 keeps the hub out. InputError where nothing is found, a file is
    broken, or it holds more than tensors; UnreachableError where only the hub could tell and it does not answer.
    """
    files, origin = _find(name)
    state = {key: value for file in files for key, value in _read(file).items()}
    digest = "+".join(file_digest(file)[:12] for file in files)
    licence = next((text for prefix, text in LICENCES.items() if name.startswith(prefix)), "as their authors state")
    say(f"pretrained weights {name} from {origin}: {len(state)} tensors; licence: {licence}")
    return state, f"{name}@{digest}"


def fill(phase: Phase, module: nn.Module, slot: str, name: str, state: Mapping[str, Tensor]) -> LoadReport:
    """Put the weights called `name` into a slot of a phase's module; InputError where they do not fit."""
    assert phase.load_pretrained is not None, "named weights must say how they go in"
    try:
        return phase.load_pretrained(module, slot, state)
    except InputError as error:
        raise InputError(
            f"{name} does not fit ({error}); name another checkpoint, or change the model section"
        ) from None


def _find(name: str) -> tuple[list[Path], str]:
    """The files that hold the weights, and in words where they were."""
    local = Path(name).expanduser()
    if local.is_file():
        return [local], "a local file"
    if local.is_dir():
        for file in FILES:
            if (local / file).exists():
                return list(_parts(local / file, lambda part: local / part)), "a local folder"
        raise InputError(f"{name}: no {', '.join(FILES)} in this folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or local.suffix in SUFFIXES or _is_below_a_folder(local):
        raise InputError(f"{name}: no such folder; give a folder, a weights file, a name on the hub, or none")
    return _from_cache(name) or _from_hub(name)


def _is_below_a_folder(local: Path) -> bool:
    """Whether a name such as weights/vit can only be meant for this machine, because the folder weights is here."""
    return local.parent != Path() and local.parent.is_dir()


def _parts(file: Path, locate: Callable[[str], Path]) -> Iterator[Path]:
    """The file itself, or the shards that an index names; `locate` turns a shard's name into its path."""
    if file.name.endswith(".index.json"):
        for part in sorted(set(json.loads(file.read_text())["weight_map"].values())):
            yield locate(part)
    else:
        yield file


def _from_cache(name: str) -> tuple[list[Path], str] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def locate(file: str) -> Path:
        return Path(hf_hub_download(name, file, local_files_only=True))

    for file in FILES:
        try:
            return list(_parts(locate(file), locate)), "the Hugging Face cache"
        except LocalEntryNotFoundError:
            continue
        except HFValidationError:
            raise InputError(f"{name}: neither a local folder nor a name on the hub; use none for no weights") from None
    return None


def _from_hub(name: str) -> tuple[list[Path], str]:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    advice = "bring the folder and name it in params.yaml, or write none"
    if constants.HF_HUB_OFFLINE:
        raise UnreachableError(f"{name}: not in the Hugging Face cache and HF_HUB_OFFLINE is set; {advice}")
    if not _is_reachable(constants.ENDPOINT):
        raise UnreachableError(f"{name}: not in the Hugging Face cache and the hub cannot be reached; {advice}")

    def locate(file: str) -> Path:
        return Path(hf_hub_download(name, file, etag_timeout=TIMEOUT, endpoint=constants.ENDPOINT))

    for file in FILES:
        try:
            return list(_parts(locate(file), locate)), "the Hugging Face hub"
        except LocalEntryNotFoundError as error:  # the connection broke; a kind of EntryNotFoundError
            raise UnreachableError(
                f"{name}: the hub did not deliver: {' '.join(str(error).split())}; {advice}"
            ) from None
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise InputError(f"{name}: the hub refuses: {' '.join(str(error).split())[:200]}; {advice}") from None
    raise InputError(f"{name}: the hub has no {', '.join(FILES)} under this name; {advice}")


def _is_reachable(endpoint: str) -> bool:
    """Ask once and shortly: the hub's client would try for half a minute. Behind a proxy only that client can know."""
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(endpoint)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), TIMEOUT).close()
    except OSError:
        return False
    return True


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of one file. Nothing in it is ever executed."""
    if file.suffix == paddle.SUFFIX:
        return paddle.read(file) | paddle.class_names(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{file}: holds more than tensors, refused; convert it to .safetensors where it is trusted"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{file}: broken or not a weights file ({' '.join(str(error).split())[:120]})") from None
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{file}: not a mapping of names to tensors")
    return dict(content)
