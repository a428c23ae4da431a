"""One DVC stage as a Prefect task: its lines as logs, its results as artifacts, its end as a state."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import BoundedSemaphore, Event
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException, TerminationSignal
from prefect.futures import wait
from prefect.states import Cancelled, Cancelling, Completed, Failed

from flows import machines, orchestration
from flows.orchestration import Placement
from models.family import InputError
from tasks import checkout, dvc_process, graph, run_links, slots
from tasks.dvc_process import StageFailed, StageUnlucky, Stopped

MAX_PICTURES = 8  # of one stage; all of them are in its report
MAX_PICTURE = 400_000  # bytes: an artifact is kept in Prefect's database
# What the stage would leave behind, and where: the report of the quarantine, of the evaluation.
PAGES = ("report.html", "quarantine.html")


@dataclass(frozen=True)
class Site:
    """Where the stages of one flow run work, and what they share there."""

    project: Path
    folder: Path  # the checkout: the project itself, or a worktree of it
    experiment: str  # under which the run is kept
    flow_run_id: str
    pool: str | None  # the work pool of the flow run; None outside one: then every stage runs here
    force: frozenset[str]
    pull: bool  # a DVC remote is configured
    push: bool  # and what is made goes there
    stop: Event = field(default_factory=Event)
    room: BoundedSemaphore = field(default_factory=BoundedSemaphore)  # stages at once

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until fewer than `max_parallel` stages run; Stopped when the run is cancelled meanwhile."""
        while not self.room.acquire(timeout=0.5):
            if self.stop.is_set():
                raise Stopped
        try:
            yield
        finally:
            self.room.release()

    @property
    def logs(self) -> Path:
        """Everything the stages print, unabridged."""
        return self.project / ".duet/logs" / self.flow_run_id


# DVC is the cache: a second one on top of it would answer with results that DVC no longer has.
@task(task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(stage: str, site: Site, placement: Placement, may_change: bool) -> State[Any]:
    """Bring a stage up to date; a stage that `dvc status` found unchanged is only shown."""
    if site.stop.is_set():
        return Cancelled(message="The run was cancelled before this stage began")
    if not may_change:
        return Completed(name="Cached", message="Unchanged since it last ran")
    try:
        if site.pool and placement.pool != site.pool:
            return run_elsewhere(stage, site, placement.pool)
        return run_here(stage, site, placement)
    except Stopped:
        return Cancelled(message="Stopped; training resumes from its checkpoint when it is run again")
    except (StageFailed, InputError) as error:
        get_run_logger().error("%s", str(error).splitlines()[0])
        return Failed(message=str(error)[-2000:])


def run_here(stage: str, site: Site, placement: Placement) -> State[Any]:
    """Run the stage on this machine, with the devices it is due, and show what it made."""
    logger = get_run_logger()
    with slots.hold(placement.devices, site.stop) as held, site.turn():
        result = reproduce(stage, site, placement, held, logger.info)
    if result == "unchanged":
        return Completed(name="Cached", message="Unchanged: what came before it made the same bytes")
    try:
        _show(stage, site)
    except Exception as error:  # a picture that cannot be shown must not undo a trained model
        logger.warning("Results of %s are not shown: %s", stage, error)
    if result == "cached":
        return Completed(name="Cached", message="Restored from the run cache")
    return Completed(message="Ran")


def run_elsewhere(stage: str, site: Site, pool: str) -> State[Any]:
    """Have a worker of another pool run the stage; its flow run ends when this one is stopped."""
    request = {"stage": stage, "folder": str(site.folder), "force": stage in site.force, "parent": site.flow_run_id}
    if site.push:
        request["origin"] = asdict(machines.describe(site.project, site.folder))
    try:
        run: Any = run_deployment(f"stage/{pool}", parameters=request, timeout=0, flow_run_name=stage)
    except ObjectNotFound:
        raise InputError(f"{stage} needs a deployment stage/{pool}; apply prefect.yaml or change its pool") from None
    get_run_logger().info("Waiting for a worker of pool %s (flow run %s)", pool, run.id)
    asked = False
    with get_client(sync_client=True) as client:
        while not (state := client.read_flow_run(run.id).state) or not state.is_final():
            if site.stop.wait(1) and not asked:
                client.set_flow_run_state(run.id, Cancelling())
                asked = True
                time.sleep(1)
    if state.is_completed():
        if machines.take_back(stage, site.folder, run.id):
            log = site.logs / f"{stage.replace('/', '-')}-pull.log"
            dvc_process.pull([stage], site.folder, get_run_logger().info, site.stop, log=log)
        return Completed(name=state.name, message=state.message)
    if state.is_cancelled() or site.stop.is_set():
        raise Stopped
    raise StageFailed(state.message or f"{stage} failed in flow run {run.id}")


@flow(name="stage", flow_run_name="{stage}", persist_result=False)
def one_stage(stage: str, folder: str, force: bool, parent: str, origin: machines.Origin | None = None) -> State[Any]:
    """One stage of another flow run, on a worker of the pool that the stage needs.

    Args:
        stage: name in dvc.yaml
        folder: the checkout of the run
        force: run it even where nothing changed
        parent: the flow run it belongs to; when that ends, so does this
        origin: how to make a checkout like that one where this worker is on another machine
    """
    project, forced = orchestration.project(), frozenset([stage]) if force else frozenset()
    try:
        with chdir(project), machines.workplace(project, Path(folder), stage, origin) as place:
            pull, push = checkout.has_remote(project), checkout.shares(project)
            site = Site(project, place, Path(folder).name, parent, None, forced, pull, push)
            future = run_stage.submit(stage, site, orchestration.load(place).of(stage), True)
            try:
                while wait([future], timeout=5).not_done:
                    _stop_with(parent, site.stop)
            except (TerminationSignal, KeyboardInterrupt):
                site.stop.set()
            future.wait()  # only this brings the future its final state
            if place != Path(folder) and future.state.is_completed():
                machines.hand_back(stage, project, place)
            ended = future.state  # Prefect would sum up a state that has ids already, and lose its name and message
            return State(type=ended.type, name=ended.name, message=ended.message)
    except (InputError, StageFailed) as error:
        return Failed(message=str(error)[-2000:])


def _stop_with(parent: str, stop: Event) -> None:
    """Stop when the flow run we belong to has ended, whatever ended it; a server that is away decides nothing."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(parent)).state
    except (httpx.HTTPError, PrefectException):
        return
    if state and state.is_final():
        stop.set()


def reproduce(
    stage: str, site: Site, placement: Placement, held: slots.Slots, emit: Callable[[str], None]
) -> dvc_process.Result:
    """Run the stage, again after a growing pause where networks, stores or a killed process made it fail."""
    environment = {**held.environment(), "PREFECT__FLOW_RUN_ID": site.flow_run_id}
    environment["DUET_HOME"] = str(site.project)
    log = site.logs / f"{stage.replace('/', '-')}.log"
    for attempt in range(placement.retries + 1):
        try:
            return dvc_process.reproduce(
                stage,
                site.folder,
                emit,
                site.stop,
                log=log,
                force=stage in site.force,
                pull=site.pull,
                push=site.push,
                timeout=placement.timeout,
                environment=environment,
                keep=held.descriptors,
            )
        except StageUnlucky as error:
            if attempt == placement.retries:
                raise
            pause = placement.backoff * 2**attempt
            emit(f"{str(error).splitlines()[-1]}: trying again in {pause:g} s ({attempt + 1} of {placement.retries})")
            site.stop.wait(pause)
    raise Stopped


def _show(stage: str, site: Site) -> None:
    """Metrics, plots, pages and runs of a stage as artifacts of its task."""
    key = re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")
    outs = [site.folder / path for path in graph.hashes(stage, site.folder / "dvc.lock")["outs"]]
    files = [file for out in outs for file in (out.rglob("*") if out.is_dir() else [out])]
    for file in (file for file in files if file.name == "metrics.json"):
        rows = [{"metric": name, "value": value} for name, value in _flat(json.loads(file.read_text()))]
        create_table_artifact(key=f"{key}-metrics", table=rows, description=f"Metrics of {stage}")
    pictures = sorted(file for file in files if file.suffix == ".png" and file.stat().st_size <= MAX_PICTURE)
    for picture in pictures[:MAX_PICTURES]:
        name = re.sub(r"[^a-z0-9]+", "-", picture.stem.lower()).strip("-")
        data = base64.b64encode(picture.read_bytes()).decode()
        address = f"data:image/png;base64,{data}"
        create_image_artifact(address, key=f"{key}-{name}", description=f"{stage}: {picture.stem}")
    for page in (file for file in files if file.name in PAGES):
        place, name = page.relative_to(site.folder), site.experiment
        text = f"`{place}` of experiment `{name}`. To open it: `dvc exp apply {name}`."
        create_markdown_artifact(text, key=f"{key}-report", description=f"Report of {stage}")
    for file in (file for file in files if file.name == "version.json"):
        if link := run_links.version_link(file):
            create_link_artifact(link[1], link_text=link[0], key=f"{key}-version", description="The registered version")
    if os.environ.get("DUET_TRACKING") != "off":
        for name, address in run_links.run_links(stage, site.flow_run_id):
            create_link_artifact(address, link_text=f"MLflow run {name}", key=f"{key}-run", description=stage)


def _flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested metrics as dotted names."""
    if not isinstance(values, dict):
        return [(prefix.rstrip("."), values)]
    return [row for key, value in values.items() for row in _flat(value, f"{prefix}{key}.")]
