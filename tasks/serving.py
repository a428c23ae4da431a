"""What MLflow runs for a registered version: it executes this file (models from code), so no object of ours is pickled.

Input: a table with a column `path` (a file the server can read) or `video` (the file's bytes in base64).
Output: a row a clip: the answer's plain values as columns, the whole answer as JSON, `error` where a clip failed.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow.models
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from tasks import bundle
from tasks.predict import Predictor, table


class ClipModel(PythonModel):
    """MLflow's interface around Predictor."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle that came with the version."""
        self.predictor = Predictor(bundle.load(Path(context.artifacts["bundle"])))

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Answers for the rows of `model_input`; `params` may hold `top`."""
        clips = [_clip(row) for row in model_input.to_dict("records")]
        return table(self.predictor.predict(clips, int((params or {}).get("top", 5))))


def _clip(row: Mapping[Any, Any]) -> Path | bytes:
    video, path = row.get("video"), row.get("path")
    if isinstance(video, str) and video:
        return base64.b64decode(video, validate=True)
    if isinstance(path, str) and path:
        return Path(path)
    raise ValueError("a row needs `path`, or `video` with the file's bytes in base64")


mlflow.models.set_model(ClipModel())
