"""The DVC graph as one flow. Also without a server of its own: `python -m flows.pipeline register@t3av`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows import orchestration
from flows.services import private_server
from flows.stage import Site, run_stage
from models.family import InputError
from tasks import checkout, dvc_process

Workspace = Literal["own", "current"]
Extent = Literal["upstream", "downstream", "alone"]
Needs = Mapping[str, Sequence[str]]


@flow(name="pipeline", persist_result=False)
def pipeline(
    targets: list[str] = [],  # noqa: B006 (Prefect shows it in the form)
    downstream: bool = False,
    force: bool = False,
    workspace: Workspace = "own",
    params: dict[str, Any] = {},  # noqa: B006
) -> State[Any]:
    """Bring stages of dvc.yaml up to date, each as a task.

    Args:
        targets: Stages to bring up to date, such as register@t3av; none: all
        downstream: Run what comes after the targets instead of what comes before them
        force: Run the stages even where nothing changed
        workspace: Where: own is a checkout of HEAD for this run alone, current the project as it is
        params: Values for params.yaml by name, such as t3av.finetune.lr; own checkout only
    """
    extent: Extent = "downstream" if downstream else "upstream"
    return run_graph(Request(targets, extent, "all" if force else (), workspace, params))


@dataclass(frozen=True)
class Request:
    """What a flow asks of the graph."""

    targets: Sequence[str] = ()  # none: every stage
    extent: Extent = "upstream"  # what runs beside the targets
    force: Sequence[str] | Literal["all"] = ()  # stages that run even where nothing changed
    workspace: Workspace = "own"
    changes: Mapping[str, Any] = field(default_factory=dict)  # params.yaml by dotted name
    overlay: Mapping[str, Any] = field(default_factory=dict)  # sections of params.yaml, of a preset


def run_graph(request: Request) -> State[Any]:
    """What every flow does. The state says what ran; a mistake in the request is one line, before any stage starts."""
    project, name = orchestration.project(), _run_name()
    try:
        with chdir(project), _checkout(project, name, request) as folder:
            needs, may_change = dvc_process.read_state(folder)
            settings = orchestration.load(folder)
            settings.check(needs)
            chosen = select(needs, request.targets, request.extent)
            forced = _forced(request, chosen, needs)
            may_change |= dvc_process.with_dependents(forced, needs)
            site = Site(
                project,
                folder,
                experiment=folder.name,
                flow_run_id=str(flow_run.get_id()),
                pool=_pool(),
                force=forced,
                pull=checkout.has_remote(project),
                push=checkout.shares(project),
                room=BoundedSemaphore(settings.max_parallel),
            )
            state = _run_stages(chosen, needs, may_change, settings, site)
            if request.workspace == "own":
                _save(site, f"{name}: {', '.join(request.targets) or 'all stages'}: {state.message}")
            if request.workspace == "own" and state.is_completed():
                checkout.remove(project, folder)
            return state
    except InputError as error:
        get_run_logger().error("%s", error)
        return Failed(message=str(error))


def _forced(request: Request, chosen: Sequence[str], needs: Needs) -> frozenset[str]:
    if request.force == "all":
        return frozenset(chosen)
    return frozenset(select(needs, request.force, "alone") if request.force else ())


def select(needs: Needs, targets: Sequence[str], extent: Extent = "upstream") -> list[str]:
    """The stages to run, in order: the targets, and all they need or (downstream) all that needs them; none: all.

    A target may leave out what follows the @ and then means all of that name.
    """
    wanted: set[str] = set()
    for target in targets:
        found = {stage for stage in needs if target in (stage, stage.partition("@")[0])}
        if not found:
            raise InputError(f"no stage {target!r}; there is {', '.join(needs)}")
        wanted |= found
    if not targets:
        return list(needs)
    if extent == "downstream":
        wanted = dvc_process.with_dependents(wanted, needs)
    if extent == "upstream":
        for stage in reversed(list(needs)):
            if stage in wanted:
                wanted.update(needs[stage])
    return [stage for stage in needs if stage in wanted]


def _run_stages(
    chosen: Sequence[str], needs: Needs, may_change: set[str], settings: orchestration.Orchestration, site: Site
) -> State[Any]:
    """Start a task per stage, each waiting for those it needs. A failed one holds up only what needs it."""
    futures: dict[str, PrefectFuture[Any]] = {}
    try:
        for stage in chosen:
            before = [futures[need] for need in needs[stage] if need in futures]
            task = run_stage.submit(stage, site, settings.of(stage), stage in may_change, wait_for=before)  # pyright: ignore[reportCallIssue]
            futures[stage] = task
        for future in futures.values():
            future.wait()
    except (TerminationSignal, KeyboardInterrupt):
        # Prefect's own handler turned SIGTERM into this exception. The stages end by themselves now, checkpoint saved;
        # the tasks return Cancelled and so does the flow.
        site.stop.set()
        for future in futures.values():
            future.wait()
        return Cancelled(message="Cancelled; running it again goes on from the last checkpoint")
    return _summary({stage: future.state for stage, future in futures.items()})


def _summary(states: Mapping[str, State[Any]]) -> State[Any]:
    cached = [stage for stage, state in states.items() if state.name == "Cached"]
    failed = [stage for stage, state in states.items() if state.is_failed() or state.is_crashed()]
    waiting = [stage for stage, state in states.items() if not state.is_final()]
    if failed:
        left = f"; not run: {', '.join(waiting)}" if waiting else ""
        return Failed(message=f"{', '.join(failed)} failed{left}")
    return Completed(message=f"{len(states) - len(cached)} stages ran, {len(cached)} cached")


@contextmanager
def _checkout(project: Path, name: str, request: Request) -> Iterator[Path]:
    if request.workspace == "own":
        with checkout.own(project, name, request.changes, request.overlay) as folder:
            yield folder
    elif request.changes or request.overlay:
        raise InputError("params can only change in a checkout of its own: choose workspace own, or edit params.yaml")
    else:
        yield project


def _pool() -> str | None:
    """The work pool whose worker runs this flow; None when it was started by hand."""
    context = FlowRunContext.get()
    return context.flow_run.work_pool_name if context and context.flow_run else None


def _save(site: Site, message: str) -> None:
    name, logger = site.experiment, get_run_logger()
    commit = checkout.save_experiment(site.project, site.folder, name, message)
    if not commit:
        logger.info("Nothing differs from HEAD, so there is no experiment to keep")
        return
    logger.info("Experiment %s (%s): see `dvc exp show`", name, commit[:7])
    if site.push:
        try:
            checkout.push_experiment(site.project, name)
        except InputError as error:
            logger.warning("Experiment %s stays on this machine: %s", name, error)
        else:
            logger.info("On another machine: `dvc exp pull origin %s`", name)


def _run_name() -> str:
    """The flow run's name and a piece of its id: unique, and fit for a folder and a git reference."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", flow_run.get_name() or "run").strip("-")
    return f"{name}-{str(flow_run.get_id())[:8]}"


def main() -> None:
    """The command line: runs here and now, under PREFECT_API_URL or a server that lives as long as the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="stages; none: all")
    parser.add_argument("--downstream", action="store_true")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--workspace", choices=["own", "current"], default="current")
    arguments = vars(parser.parse_args())
    with private_server(orchestration.project()):
        state = pipeline(**arguments, return_state=True)  # pyright: ignore[reportCallIssue]
    print(f"{state.name}: {state.message}", flush=True)
    sys.exit(0 if state.is_completed() else 1)


if __name__ == "__main__":
    main()
