"""Publishing: one commit of a stage's files to its own branch, compared before and verified after, and never made twice.

Trainer's own `push_to_hub` is not used: its uploads read a folder that the next save overwrites.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hfpipe import artifact
from hfpipe.errors import UserError
from hfpipe.hub_client import Refused, Unreachable, ask, list_files, within
from hfpipe.publishing.package import RUN_FILE, TOLD, Package, pack, place_of, published_at
from hfpipe.run_folder import damage_at
from hfpipe.sections import Hub

T = TypeVar("T")
_ATTEMPTS = 5  # of a commit and what goes with it, where they fail at once
_ENOUGH_S = 60  # uploads are tried again by the client itself: after this long of failing it is left for later
_WAIT_S = (1.0, 2.0, 4.0, 8.0)
_PROBE_S = 60
_SCRATCH = "hfpipe-probe"
_STARTERS = (".gitattributes", "README.md", "LICENSE")  # what the Hub's form for a new repo leaves
ERROR_FILE = "push.json"  # in a run's logs: why the last push did not get through


def check_access(hub: Hub, stages: list[str]) -> str | None:
    """Try, before anything trains and within a minute, all that publishing needs: token, namespace, repo, a branch for each stage.

    Returns what must be said where the Hub is not reached: a run goes on without it.

    Raises:
        UserError: the Hub says no.
    """
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    where = f"hub.repo_id = {hub.repo_id!r}"
    if get_token() is None:
        raise UserError(
            f"{where}: no token to publish with. Run `hf auth login`, set HF_TOKEN, or leave hub.repo_id out."
        )
    try:
        within(_PROBE_S, lambda: _probe(api, hub, stages, where))
    except Refused as error:
        raise UserError(
            f"{where}: the Hub refuses: {error}. Give a namespace and a token that may write there."
        ) from None
    except Unreachable as error:
        return f"the Hub is not reached ({error}); the run goes on, and its results wait on the disk to be pushed"
    return None


def _probe(api: Any, hub: Hub, stages: list[str], where: str) -> None:
    who = ask(api.whoami)
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError(f"{where}: the token of {who['name']} may only read. Make one that may write.")
    for repo_id in dict.fromkeys([place_of(hub, stage)[0] for stage in stages]):
        _make_repo(api, repo_id, hub, where)
        _check_is_ours(api, repo_id, where)
    for stage in stages:
        repo_id, branch = place_of(hub, stage)
        if branch != "main":
            _make_branch(api, repo_id, branch)
        else:  # that of a repo is there already, whoever made it
            _make_branch(api, repo_id, _SCRATCH)
            ask(api.delete_branch, repo_id, branch=_SCRATCH)


def _make_repo(api: Any, repo_id: str, hub: Hub, where: str) -> None:
    ask(api.create_repo, repo_id, private=hub.private, exist_ok=True)
    if hub.private and ask(api.repo_info, repo_id, timeout=20).private is False:
        raise UserError(
            f"{where}: {repo_id} is public, and hub.private is true. Make it private on the Hub, set hub.private: false, "
            "or give another repo_id."
        )


def _check_is_ours(api: Any, repo_id: str, where: str) -> None:
    """UserError where a repo's `main` holds something that hfpipe did not publish."""
    files = list_files(repo_id, ask(api.repo_info, repo_id, timeout=20).sha)
    foreign = sorted(set(files) - set(_STARTERS))
    if foreign and artifact.STAGE_FILE not in files:
        raise UserError(
            f"{where}: {repo_id} is there already and holds {', '.join(foreign[:5])}, which hfpipe did not publish. "
            "Give another repo_id."
        )


def _make_branch(api: Any, repo_id: str, branch: str) -> None:
    """A branch that begins where the repo did, so that it holds nothing before its stage is published."""
    if branch != "main":
        first = ask(api.list_repo_commits, repo_id)[-1].commit_id
        ask(api.create_branch, repo_id, branch=branch, revision=first, exist_ok=True)


def patiently(act: Callable[[], T], sleep: Callable[[float], Any] = time.sleep) -> T:
    """Act until it gets through; `act` must be one that may be done again after it got through unseen."""
    began = time.monotonic()
    for attempt in range(_ATTEMPTS):
        try:
            return act()
        except Unreachable as error:
            if attempt == _ATTEMPTS - 1 or time.monotonic() - began > _ENOUGH_S:
                raise
            sleep(error.wait_s if error.wait_s is not None else 0.1 if error.moved else _WAIT_S[attempt])
    raise AssertionError


def commit_package(
    api: Any, package: Package, repo_id: str, branch: str, message: str, source: str | None = None
) -> tuple[str, int]:
    """Make a branch hold a package's files; returns the commit that does, and how many files changed.

    Large files that `source`, a commit of the same repo, holds are copied there and not read here.

    What the branch holds is compared first: a commit whose answer was lost is not made again. Files that an earlier stage.json
    of the branch names and this one does not are deleted; files that others have put there stay.

    Raises:
        Refused: the Hub says no.
        Unreachable: it did not get through, or stands there with other digests.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    head = ask(api.repo_info, repo_id, revision=branch, timeout=20).sha
    there = list_files(repo_id, head)
    wrong = package.differing(there)
    extra = sorted((_published_before(api, repo_id, head, there) & set(there)) - set(package.files))
    if not wrong and not extra:
        return head, 0
    held = {name: entry for name, entry in list_files(repo_id, source).items() if entry.lfs} if source else {}
    copied = held.keys() - set(package.differing(held))
    contents = [(name, package.files[name]) for name in wrong if name not in copied]
    adds = [CommitOperationAdd(name, c if isinstance(c, bytes) else str(c)) for name, c in contents]
    copies = [CommitOperationCopy(name, name, src_revision=source) for name in wrong if name in copied]
    deletes = [CommitOperationDelete(name) for name in extra]
    about = {"commit_message": message, "revision": branch, "parent_commit": head}
    commit = ask(api.create_commit, repo_id, operations=[*adds, *copies, *deletes], **about).oid
    if still := package.differing(list_files(repo_id, commit)):
        raise Unreachable(f"{', '.join(still)} stand in commit {commit[:12]} other than here")
    return commit, len(wrong) + len(extra)


def _published_before(api: Any, repo_id: str, head: str, there: dict[str, Any]) -> set[str]:
    """The files that are ours in a commit, by the record in it."""
    if artifact.STAGE_FILE not in there:
        return set()
    file = ask(api.hf_hub_download, repo_id, artifact.STAGE_FILE, revision=head)
    record = artifact.read_json(Path(file)) or {}
    files = record.get("files")
    return {*(files if isinstance(files, dict) else ()), *TOLD}


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One push at a time of a run."""
    with open(run / ".push.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run} is being pushed by another process. Wait for it; what is left then can be pushed."
            ) from None
        yield


def push_run(
    run: Path,
    say: Callable[[str, str], None],
    watch: Callable[[str, float], contextlib.AbstractContextManager[Any]],
    stages: list[str],
    hub: Hub,
) -> list[dict[str, Any]]:
    """Publish finished stages of a run, in order; idempotent.

    Args:
        watch: of a stage and the seconds it may take, a context that ends the process when they are over.

    Returns what was published, a mapping for each stage.

    Raises:
        UserError: the Hub says no.
        Unreachable: it did not get through; stages before it are published and written down.
    """
    from huggingface_hub import HfApi

    if hub.repo_id is None:
        raise UserError(f"{run}: no repo to push to. Give --repo-id me/NAME, or set hub.repo_id in the recipe.")
    api, done = HfApi(), []
    with _alone(run):
        (run / "logs" / ERROR_FILE).unlink(missing_ok=True)
        try:
            with watch(str(hub.repo_id), hub.timeout_minutes * 60 if hub.timeout_minutes is not None else 600):
                heads = patiently(lambda: _heads(api, hub, stages))
            for stage in stages:
                with watch(stage, _patience_s(hub, run / stage)):
                    done.append(_push_stage(api, run, hub, stage, heads, say))
            if done:
                with watch("main", _patience_s(hub, run / done[-1]["stage"])):
                    _push_main(api, run, hub, {told["stage"]: told["commit"] for told in done}, say)
        except Refused as error:
            note_failure(run, str(error))
            raise UserError(
                f"{hub.repo_id}: the Hub refuses: {error}. Nothing here is lost; mend it and push again."
            ) from None
        except (Unreachable, UserError) as error:
            note_failure(run, str(error))
            raise
    return done


def _heads(api: Any, hub: Hub, stages: list[str]) -> dict[tuple[str, str], str]:
    """Where the branches of stages' repos stand now; none of a repo that is not there."""
    heads = {}
    for repo_id in dict.fromkeys(place_of(hub, stage)[0] for stage in stages):
        with contextlib.suppress(Refused):
            refs = ask(api.list_repo_refs, repo_id)
            heads |= {(repo_id, branch.name): branch.target_commit for branch in refs.branches}
    return heads


def _patience_s(hub: Hub, folder: Path) -> float:
    if hub.timeout_minutes is not None:
        return hub.timeout_minutes * 60
    return 600 + sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


def _push_stage(
    api: Any, run: Path, hub: Hub, stage: str, heads: dict[tuple[str, str], str], say: Callable[[str, str], None]
) -> dict[str, Any]:
    repo_id, branch = place_of(hub, stage)
    commit = published_at(run, hub, stage)
    if commit is None or heads.get((repo_id, branch)) != commit:  # `main` of a repo of its own moves on with run.json
        if reason := damage_at(run / stage):  # hours after it was found whole, perhaps
            raise UserError(f"{run / stage} is not published: {reason}. Make that stage again.")
        package, where = pack(run, hub, stage), f"--repo-id {hub.repo_id}"
        patiently(lambda: _make_repo(api, repo_id, hub, where))
        patiently(lambda: _check_is_ours(api, repo_id, where))
        patiently(lambda: _make_branch(api, repo_id, branch))
        head, sent = patiently(lambda: commit_package(api, package, repo_id, branch, f"{stage}, by hfpipe"))
        if not sent and commit is not None:
            return {"stage": stage, "repo_id": repo_id, "revision": branch, "commit": commit}
        commit = head
        told = {"repo_id": repo_id, "revision": branch, "commit": commit, "content": package.content}
        artifact.amend_record(run / stage / artifact.STAGE_FILE, hub={**told, "section": dataclasses.asdict(hub)})
        say(
            stage,
            f"published: {repo_id}@{branch}, commit {commit[:12]}, {sent or 'no'} files changed, all digests as here",
        )
    return {"stage": stage, "repo_id": repo_id, "revision": branch, "commit": commit}


def _push_main(api: Any, run: Path, hub: Hub, pushed: dict[str, str], say: Callable[[str, str], None]) -> None:
    """`main` is the last published stage, with `run.json`: the commit of every one. A run that is whole gets a tag, in each of its repos."""
    record = artifact.read_json(run / RUN_FILE) or {}
    stages = record.get("stages", [])
    commits = {stage: commit for stage in stages if (commit := pushed.get(stage) or published_at(run, hub, stage))}
    last = list(commits)[-1]
    section = {k: v for k, v in dataclasses.asdict(hub).items() if k not in ("repo_id", "timeout_minutes")}
    record = {"recipe": record.get("recipe"), "stages": stages, "commits": commits, "hub": section}
    content = (json.dumps(record, indent=2) + "\n").encode()
    repo_id = str(hub.repo_id) if hub.layout == "revisions" else place_of(hub, last)[0]
    source = commits[last] if hub.layout == "revisions" else None  # else it lies there already
    package = pack(run, hub, last)
    package = Package(last, {**package.files, RUN_FILE: content}, package.known)
    message = f"{last} is the last stage so far, by hfpipe"
    commit, _ = patiently(lambda: commit_package(api, package, repo_id, "main", message, source))
    if list(commits) == stages:
        finished = str((artifact.read_record(run / last / artifact.STAGE_FILE) or {}).get("finished"))[:10]
        tag = f"run-{finished}-{artifact.digest(commits)[:8]}"
        places = {place_of(hub, stage)[0]: at for stage, at in commits.items()} if hub.layout == "repos" else {}
        places[repo_id] = commit
        if any([patiently(functools.partial(_tag, api, place, tag, at)) for place, at in places.items()]):
            say("main", f"published: {repo_id}, which is {last} with the commits of all stages, tagged {tag}")


def _tag(api: Any, repo_id: str, tag: str, commit: str) -> bool:
    """Put a tag on a commit; True where it is new. An older tag of that name on another commit is moved."""
    tags = {ref.name: ref.target_commit for ref in ask(api.list_repo_refs, repo_id).tags}
    if tags.get(tag) == commit:
        return False
    if tag in tags:
        ask(api.delete_tag, repo_id, tag=tag)
    ask(api.create_tag, repo_id, tag=tag, revision=commit, exist_ok=True)
    tags = {ref.name: ref.target_commit for ref in ask(api.list_repo_refs, repo_id).tags}
    if tags.get(tag) != commit:
        raise Unreachable(f"the tag {tag} is not on commit {commit[:12]}")
    return True


def note_failure(run: Path, reason: str) -> None:
    (run / "logs").mkdir(exist_ok=True)
    artifact.write_json(
        run / "logs" / ERROR_FILE, {"reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    )
