"""The forms in Prefect's interface: every field explains itself, every recipe can be chosen."""

from __future__ import annotations

import pydoc
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema

from tasks import params

ROOT = Path(__file__).parents[2]


def forms(tag: str) -> list[Any]:
    """The flows that prefect.yaml deploys under a tag."""
    listed = params.read(ROOT / "prefect.yaml")["deployments"]
    return [
        pydoc.locate(each["entrypoint"]) for each in listed if tag in each["tags"] and "internal" not in each["tags"]
    ]


@pytest.mark.parametrize("started", forms("duet"), ids=lambda started: started.name)
def test_every_field_of_a_form_has_its_help(started: Any) -> None:
    fields = parameter_schema(started).model_dump()["properties"]
    assert fields and all(field.get("description") for field in fields.values())


@pytest.mark.parametrize("started", forms("family"), ids=lambda started: started.name)
def test_a_familys_form_offers_its_presets(started: Any) -> None:
    offered = parameter_schema(started).model_dump()["properties"]["preset"]["enum"]
    assert sorted(offered[1:]) == sorted(path.stem for path in (ROOT / "models" / started.name).glob("*.yaml"))
