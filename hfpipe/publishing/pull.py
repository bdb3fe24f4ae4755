"""Pulling: a published run restored stage by stage, each at the commit that its `run.json` names and held to its record."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.hub_client import Refused, Unreachable, fetch, is_commit, list_files, resolve, split_id, verified
from hfpipe.publishing.package import RUN_FILE, pack, place_of
from hfpipe.run_folder import complete_at, damage_at, lock
from hfpipe.sections import Hub
from hfpipe.strict import build

_TAKEN = ("logs", RUN_FILE, "report.html")  # names in a run's folder that no stage can have


def read_run(source: str) -> tuple[str, str, dict[str, Any] | None]:
    """Repo, commit and `run.json` of `me/tiny@revision`; None where that revision is not a run's but a model's."""
    repo_id, revision = split_id(source)
    commit = resolve(repo_id, revision)
    # A commit never changes: what was verified here needs no Hub.
    folder = verified(repo_id, commit, only=(RUN_FILE,)) or verified(repo_id, commit)
    if folder is None:
        try:
            if RUN_FILE not in list_files(repo_id, commit):
                return repo_id, commit, None
        except Refused as error:
            raise UserError(f"{source}: the Hub does not give it: {error}") from None
        except Unreachable as error:
            raise UserError(
                f"{repo_id}@{commit[:12]} was never verified here, and the Hub is not reached ({error}). Connect first."
            ) from None
        folder = fetch(repo_id, commit, only=(RUN_FILE,))
    record = artifact.read_json(folder / RUN_FILE)
    return repo_id, commit, record if _is_run(record) else None


def _is_run(record: Any) -> bool:
    """Whether a `run.json` is one of ours, and names nothing that could not be a stage's folder."""
    if not isinstance(record, dict) or not isinstance(record.get("stages"), list):
        return False
    commits, names = record.get("commits"), [record.get("recipe"), *record["stages"]]
    if not isinstance(commits, dict) or not commits or not set(commits) <= set(map(str, record["stages"])):
        return False
    plain = all(isinstance(n, str) and n and PurePosixPath(n).name == n and n[0] not in ".~" for n in names)
    return plain and not set(names[1:]) & set(_TAKEN) and all(map(is_commit, commits.values()))


def pull_run(repo_id: str, record: dict[str, Any], run: Path) -> dict[str, str]:
    """Restore every published stage into `run`; stages that are there already, the same, are left alone.

    Returns what became of each: `restored` or `there already`.

    Raises:
        UserError: another recipe's folder, a stage there that differs, or one on the Hub that is not what it says.
    """
    hub = build(Hub, {**record["hub"], "repo_id": repo_id} if isinstance(record.get("hub"), dict) else {}, "", [])
    hub = hub or Hub(repo_id=repo_id)
    if hub.layout == "repos":
        hub = Hub(**{**vars(hub), "repo_id": repo_id.removesuffix(f"-{list(record['commits'])[-1]}")})
    with lock(run):
        there = artifact.read_json(run / RUN_FILE)
        if there and there.get("recipe") != record["recipe"]:
            raise UserError(f"{run} was made by the recipe `{there.get('recipe')}`. Give another folder with --out.")
        told = {}
        if there is None:
            artifact.write_json(run / RUN_FILE, {"recipe": record["recipe"], "stages": record["stages"]})
        for stage, commit in record["commits"].items():
            told[stage] = _pull_stage(hub, commit, run, stage)
        return told


def _pull_stage(hub: Hub, commit: str, run: Path, stage: str) -> str:
    repo_id, branch = place_of(hub, stage)
    source = fetch(repo_id, commit)
    what = f"{repo_id}@{commit[:12]}"
    record = artifact.read_record(source / artifact.STAGE_FILE)
    if record is None or record.get("stage") != stage or not isinstance(record.get("files"), dict):
        raise UserError(
            f"{what} does not hold the stage `{stage}` as hfpipe publishes one: its {artifact.STAGE_FILE} is another."
        )
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in record["files"]):
        raise UserError(f"{what}: its {artifact.STAGE_FILE} names files outside its folder.")
    folder, outcome = run / stage, "restored"
    if folder.is_dir():
        ours = artifact.read_record(folder / artifact.STAGE_FILE) or {}
        if not complete_at(folder, record["fingerprint"]) or damage_at(folder) or _weights(ours) != _weights(record):
            raise UserError(f"{folder} is there and is not what {what} holds. Give another --out, or remove it.")
        outcome = "there already"
    else:
        work = run / f"{stage}.pulled"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)  # what the cache links to is copied
        if reason := artifact.damage(work, record["files"]):
            raise UserError(f"{what}: {reason}, by the record that stands beside it.")
        for name, file in record["files"].items():
            os.utime(
                work / name, ns=(file["mtime_ns"], file["mtime_ns"])
            )  # by which large files are known to be untouched
        artifact.sync_tree(work)
        work.rename(folder)
        artifact.sync(run)
    told = {"repo_id": repo_id, "revision": branch, "commit": commit, "section": vars(hub), "content": ""}
    artifact.amend_record(folder / artifact.STAGE_FILE, hub=told)
    artifact.amend_record(folder / artifact.STAGE_FILE, hub={**told, "content": pack(run, hub, stage).content})
    return outcome


def _weights(record: dict[str, Any]) -> dict[str, str]:
    return {name: file["sha256"] for name, file in record.get("files", {}).items() if name.endswith(".safetensors")}
