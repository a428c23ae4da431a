"""Weights into modules: every key matched or reported."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from models.family import InputError, LoadReport


def load_matching(module: nn.Module, state: Mapping[str, Tensor], fresh: tuple[str, ...] = ()) -> LoadReport:
    """Load what `module` and `state` share. Keys that start with one of `fresh` may be missing and stay as they are.

    InputError for any other missing key and for a shape that differs: it is another architecture's checkpoint.
    """
    own, advice = module.state_dict(), "give the model section the values it was trained with"
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise InputError(
                f"checkpoint of another architecture: {key} is {tuple(state[key].shape)} there and {tuple(value.shape)} "
                f"here; {advice}"
            )
    missing = [key for key in own if key not in state]
    lost = [key for key in missing if not key.startswith(fresh)] if fresh else missing
    if lost:
        raise InputError(
            f"checkpoint of another architecture: it lacks {lost[0]} and {len(lost) - 1} more tensors; {advice}"
        )
    loaded = {key: value for key, value in state.items() if key in own}
    module.load_state_dict(loaded, strict=False)
    return LoadReport(sorted(loaded), missing, sorted(key for key in state if key not in own))
