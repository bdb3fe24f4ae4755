"""Pulling: a published run restored stage by stage, each at the commit that its `run.json` names and held to its record."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.hub_client import fetch, resolve, split_id
from hfpipe.publishing.package import RUN_FILE, pack, place_of
from hfpipe.run_folder import complete_at, damage_at, lock
from hfpipe.sections import Hub


def read_run(source: str) -> tuple[str, str, dict[str, Any] | None]:
    """Repo, commit and `run.json` of `me/tiny@revision`; None where that revision is not a run's but a model's."""
    repo_id, revision = split_id(source)
    commit = resolve(repo_id, revision)
    folder = fetch(repo_id, commit, name=revision or "main", only=(RUN_FILE,))
    return repo_id, commit, artifact.read_json(folder / RUN_FILE)


def pull_run(repo_id: str, record: dict[str, Any], run: Path) -> dict[str, str]:
    """Restore every published stage into `run`; stages that are there already are left alone.

    Returns what became of each: `restored` or `there already`.

    Raises:
        UserError: another recipe's folder, or a stage there that differs.
    """
    names = [record.get("recipe"), *record.get("stages", []), *record.get("commits", {})]
    if any(not isinstance(name, str) or not name or Path(name).name != name or name[0] == "." for name in names):
        raise UserError(f"{repo_id}: its {RUN_FILE} names a stage that cannot be a folder's name.")
    with lock(run):
        there = artifact.read_json(run / RUN_FILE)
        if there and there.get("recipe") != record["recipe"]:
            raise UserError(f"{run} was made by the recipe `{there.get('recipe')}`. Give another folder with --out.")
        told = {}
        hub = Hub(repo_id=repo_id, layout=record.get("layout", "revisions"))
        if hub.layout == "repos":
            hub = Hub(repo_id=repo_id.removesuffix(f"-{list(record['commits'])[-1]}"), layout="repos")
        if there is None:
            artifact.write_json(run / RUN_FILE, {"recipe": record["recipe"], "stages": record["stages"]})
        for stage, commit in record["commits"].items():
            place, branch = place_of(hub, stage)
            told[stage] = _pull_stage(hub, place, branch, commit, run, stage)
        return told


def _pull_stage(hub: Hub, repo_id: str, branch: str, commit: str, run: Path, stage: str) -> str:
    source = fetch(repo_id, commit, name=branch)
    record = artifact.read_record(source / artifact.STAGE_FILE)
    if record is None:
        raise UserError(f"{repo_id}@{commit[:12]}: its {artifact.STAGE_FILE} is missing or changed.")
    folder = run / stage
    if folder.is_dir():
        if complete_at(folder, record["fingerprint"]) and damage_at(folder) is None:
            return "there already"
        raise UserError(
            f"{folder} is there and is not what {repo_id}@{commit[:12]} holds. Give another --out, or remove it."
        )
    work = run / f"{stage}.pulled"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work)  # what the cache links to is copied
    if reason := artifact.damage(work, record["files"]):
        raise UserError(f"{repo_id}@{commit[:12]}: {reason}, by the record that stands beside it.")
    for name, file in record["files"].items():
        os.utime(work / name, ns=(file["mtime_ns"], file["mtime_ns"]))  # by which large files are known to be untouched
    artifact.sync_tree(work)
    work.rename(folder)
    artifact.sync(run)
    told = {"repo_id": repo_id, "revision": branch, "commit": commit, "section": vars(hub)}
    artifact.amend_record(folder / artifact.STAGE_FILE, hub={**told, "content": ""})
    artifact.amend_record(folder / artifact.STAGE_FILE, hub={**told, "content": pack(run, hub, stage).content})
    return "restored"
