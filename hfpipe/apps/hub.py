"""`hfpipe status`, `push`, `pull` and `lineage`: a run and the Hub."""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.errors import StageFailed, UserError, nearest
from hfpipe.hub_client import Unreachable, ask_anew, fetch, tell_notes
from hfpipe.publishing.hub import ERROR_FILE, push_run
from hfpipe.publishing.lineage import trace
from hfpipe.publishing.package import finished_stages, hub_of, place_of, published_at
from hfpipe.publishing.pull import pull_run, read_run
from hfpipe.publishing.pusher import watch
from hfpipe.run_folder import check_is_run, damage_at, unfinished_step


@contextlib.contextmanager
def notes_told() -> Iterator[None]:
    """What had to be taken from memory in here is told on the standard error, also where something fails."""
    try:
        yield
    finally:
        tell_notes(lambda note: print(f"hfpipe: {note}", file=sys.stderr))


def _stages(run: Path) -> list[str]:
    check_is_run(run)
    record = artifact.read_json(run / "run.json") or {}
    if not isinstance(record.get("stages"), list):
        raise UserError(f"{run / 'run.json'} is damaged: no list of stages in it. `hfpipe run` there writes it again.")
    return record["stages"]


def status_rows(run: Path) -> list[dict[str, Any]]:
    """Where each stage of a run stands: `stage`, `state`, and of a finished one `repo_id`, `revision` and `commit`.

    `commit` is None where the Hub does not hold it as it stands here. Asks nothing of the Hub.
    """
    hub, rows = hub_of(run), []
    for stage in _stages(run):
        row: dict[str, Any] = {"stage": stage, **_state(run, stage)}
        if hub.repo_id and row["state"] == "finished":
            repo_id, branch = place_of(hub, stage)
            row |= {"repo_id": repo_id, "revision": branch, "commit": published_at(run, hub, stage)}
        rows.append(row)
    return rows


def status(run: Path, as_json: bool) -> None:
    """Print where each stage of a run stands."""
    rows = status_rows(run)
    failure = artifact.read_json(run / "logs" / ERROR_FILE)
    left = [row["stage"] for row in rows if row.get("commit", "") is None]
    if as_json:
        print(json.dumps({"run": str(run), "stages": rows, "to_push": left, "last_failure": failure}, indent=2))
        return
    for row in rows:
        where = ""
        if "commit" in row:
            at = f"{row['repo_id']}@{row['revision']}"
            where = f"  published: {at}, commit {row['commit'][:12]}" if row["commit"] else f"  not published yet: {at}"
        print(f"{row['stage']:<10} {row['state']}{where}")
    if left:
        why = f" The last push ended with: {failure['reason']}" if failure else ""
        print(f"{len(left)} to push: hfpipe push {shlex.quote(str(run))}{why}")


def _state(run: Path, stage: str) -> dict[str, Any]:
    folder, work = run / stage, run / f"{stage}.partial"
    if folder.is_dir():
        reason = damage_at(folder)
        return {"state": f"damaged: {reason}" if reason else "finished"}
    step = unfinished_step(work)
    if work.is_dir():
        return {"state": f"begun, at step {step}" if step else "begun"}
    return {"state": "not begun"}


def push_stages(
    run: Path, say: Callable[[str, str], None], stages: list[str] | None, repo_id: str | None, private: bool | None
) -> list[dict[str, Any]]:
    """Publish what is finished and not on the Hub as it stands here: `stage`, `repo_id`, `revision` and `commit` of each.

    Raises:
        UserError: no such stage, no repo named, or the Hub says no.
        StageFailed: not everything got through; what did is written down, and the same call sends the rest.
    """
    known = _stages(run)
    finished = finished_stages(run)
    for stage in stages or []:
        if stage not in known:
            raise UserError(f"--stage {stage}: no such stage; the run has {', '.join(known)}.{nearest(stage, known)}")
        if stage not in finished:
            raise UserError(
                f"--stage {stage}: it is {_state(run, stage)['state']}, and only what is finished is published."
            )
    if not finished:
        raise UserError(f"{run}: no stage is finished yet.")
    try:
        return push_run(run, say, functools.partial(watch, run), stages or finished, hub_of(run, repo_id, private))
    except Unreachable as error:
        raise StageFailed(
            f"not everything got through to the Hub: {error}\nNothing here is lost; the same command sends what is left."
        ) from None


def push(run: Path, stages: list[str] | None, repo_id: str | None, public: bool | None, as_json: bool) -> None:
    """Publish, and print what was sent."""
    told: list[str] = []

    def say(stage: str, text: str) -> None:
        told.append(stage)
        if not as_json:
            print(f"{stage:<10} {text}", flush=True)

    done = push_stages(run, say, stages, repo_id, None if public is None else not public)
    if as_json:
        print(json.dumps(done, indent=2))
    elif not told:
        print(f"{len(done)} stages are published already, as they stand here: {done[0]['repo_id']}")


def restore(source: str, out: Path | None) -> dict[str, Any]:
    """Restore a published run into `run`, or fetch one model into `folder`; every file is verified.

    Raises:
        UserError: there is no such repo, its files differ from what they should be, or `out` is taken.
    """
    ask_anew()
    repo_id, commit, record = read_run(source)
    if record is not None:
        run = out or Path("runs") / str(record.get("recipe"))
        stages = pull_run(repo_id, record, run)
        left = [stage for stage in record["stages"] if stage not in stages]
        return {"run": run, "commit": commit, "stages": stages, "commits": record["commits"], "not_published": left}
    folder = fetch(repo_id, commit)
    if out:
        if out.exists():
            raise UserError(f"--out {out} is there already. Give another folder.")
        beside = out.with_name(f"{out.name}.pulled")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(folder, beside)
        beside.rename(out)
        folder = out
    return {"model": repo_id, "commit": commit, "folder": folder}


def pull(source: str, out: Path | None, as_json: bool) -> None:
    """Restore, and print what became of each stage."""
    told = restore(source, out)
    if as_json:
        print(json.dumps(told, indent=2, default=str))
        return
    if "folder" in told:
        print(f"{told['model']}@{told['commit'][:12]}, every file verified: {told['folder']}")
        return
    for stage, what in told["stages"].items():
        print(f"{stage:<10} {what}, every file verified: commit {told['commits'][stage][:12]}")
    left = ", ".join(told["not_published"])
    more = f"; not published there: {left}. `hfpipe run` goes on from here." if left else "."
    print(f"{told['run']} is restored{more}")


def lineage(source: str, as_json: bool) -> int:
    """Print the stages that led to a model and what of each still holds; 2 where something does not."""
    links = trace(source)
    if as_json:
        rows = [
            {
                "stage": link.name,
                "where": link.where,
                "fingerprint": link.record["fingerprint"],
                "checks": [{"what": w, "verdict": v, "why": y} for w, v, y in link.checks],
            }
            for link in links
        ]
        print(json.dumps({"model": source, "links": rows, "holds": not any(link.broken for link in links)}, indent=2))
    else:
        for link in links:
            print(f"{link.name:<10} {link.where}")
            for what, verdict, why in link.checks:
                print(f"{'':<10}   {verdict:<9} {what}: {why}")
    return 2 if any(link.broken for link in links) else 0
