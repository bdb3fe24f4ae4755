"""The tests' own Hub, as the unmodified client sees it."""

from __future__ import annotations


def test_the_servers_run(hub, hub_env, repo_id):
    assert hub_env["HF_ENDPOINT"] == hub.endpoint and not hub.requests()
