"""Both interfaces as a person uses them, in Debian's chromium: a run started with its form, two versions compared.

`DUET_SCREENSHOTS=docs pytest tests/flows/test_browser.py` makes the README's pictures anew.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as Late

from tests.flows.servers import Running
from tests.test_demo import dvc, project

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """`make up` in a small project that has trained and registered a first version."""
    folder = tmp_path / "project"
    folder.mkdir()
    project(folder)
    dvc(folder, "repro", "register@t3av")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "dvc.lock"], cwd=folder, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "first version"], cwd=folder, check=True)
    monkeypatch.setenv("DUET_PROJECT", str(folder))
    running = Running()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that containers and root do not have; every page here is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        yield page
        browser.close()


@pytest.fixture
def keep(page: Page, tmp_path: Path) -> Callable[[str], None]:
    """Saves what the page shows, without its animations half way."""
    folder = Path(os.environ.get("DUET_SCREENSHOTS", tmp_path))

    def save(name: str) -> None:
        page.wait_for_timeout(3000)
        page.screenshot(path=folder / f"{name}.png")

    return save


def field(within: Page | Locator, label: str) -> Locator:
    """A field of Prefect's form, or a group of them."""
    return within.locator(f'div.schema-form-property:has(> .p-label__header:has-text("{label} (Optional)"))')


def submit(page: Page) -> str:
    """Press Submit, again where the page did nothing or a busy server refused: while it checks what was typed, a click can
    be lost. The run's id."""
    said = "the form asks for no run"
    for _ in range(3):
        try:
            with page.expect_response(re.compile("create_flow_run"), timeout=60_000) as answer:
                page.get_by_role("button", name="Submit").click()
        except Late:
            continue
        if answer.value.ok:
            return answer.value.json()["id"]
        said = f"{answer.value.status}: {answer.value.text()}"
    raise AssertionError(said)


def test_a_run_is_started_with_its_form_and_its_version_compared(
    servers: Running, page: Page, keep: Callable[[str], None]
) -> None:
    page.goto(f"{servers.prefect}/deployments")
    page.get_by_role("link", name="t3av", exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    expect(field(page, "devices")).to_contain_text("GPUs a phase trains on")
    finetune = field(page, "finetune")
    for label, kind, value in (("Epochs", "int", "3"), ("Learning rate", "float", "0.002")):
        field(finetune, label).get_by_role("button", name=kind).click()
        field(finetune, label).get_by_role("spinbutton").fill(value)
    finetune.scroll_into_view_if_needed()
    keep("prefect-form")
    run = submit(page)
    page.goto(f"{servers.prefect}/runs/flow-run/{run}")
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=1_200_000)
    state = servers.state(run)
    assert state["message"] == "3 stages ran, 6 cached"
    (link,) = servers.post("/artifacts/filter", artifacts={"key": {"any_": ["register-t3av-version"]}})
    assert f"{servers.mlflow}/#/models/duet-t3av/versions/2" in link["data"]
    page.reload()  # the graph drawn once the run has its full length
    page.get_by_text("Task Runs", exact=True).click()
    expect(page.get_by_text("Cached", exact=True).first).to_be_visible(timeout=120_000)
    keep("prefect-run")

    page.goto(f"{servers.mlflow}/#/models/duet-t3av")
    for version in ("Version 1", "Version 2"):
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name=version, exact=True))
        row.get_by_role("checkbox").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("heading", name="Comparing 2 Versions")).to_be_visible(timeout=120_000)
    expect(page.get_by_role("row", name="training.epochs 2 3")).to_be_visible(timeout=120_000)
    expect(page.get_by_role("row", name="training.lr 0.0015 0.002")).to_be_visible()
    expect(page.get_by_role("row", name="test/").first).to_be_visible()
    page.get_by_role("button", name="Close").click()  # MLflow's assistant, and the schemas, which are the same
    page.get_by_role("button", name="Schema").click()
    keep("mlflow-compare")

    run = servers.trigger("promote/promote", family="t3av")
    gate = servers.wait(run)
    assert gate["name"] in ("Promoted", "Held"), servers.log(run)
    page.goto(f"{servers.prefect}/artifacts/key/promote-t3av")
    words = "is the champion now" if gate["name"] == "Promoted" else "is not promoted"
    expect(page.get_by_text(f"duet-t3av 2 {words}")).to_be_visible()
    keep("prefect-promote")
