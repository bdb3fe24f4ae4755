from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from .warm import Warm, call

# The suite runs in three processes (pytest-xdist), for two cores, since many tests wait for a process or a server: one
# thread each, or they wait for each other more than they compute.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
# Slices of public data: other people's, so not shipped; tests that need them skip where the folder is absent.
REAL = Path(os.environ.get("HFPIPE_REAL_DATA", ROOT.parent / "shared" / "data" / "real"))
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"the public data slices are not in {REAL}")
REPO_NUMBERS = itertools.count(1)
WARM: dict[frozenset, Warm] = {}  # by their environment
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# A file is one worker's, so the longest begin first: none is then waited for at the end.
LONGEST = (
    "sequences", "nothing_lost", "hub", "notebooks", "hub_read", "pipeline", "training", "fuzz", "ppo", "adapters",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Temporary files lie in memory where there is plenty: half of a small stage's time is waiting for the disk (fsync)."""
    memory = Path("/dev/shm")
    if not config.option.basetemp and memory.is_dir() and shutil.disk_usage(memory).free > 12 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Prepared data of the tests goes to a folder of theirs, unless the environment names one."""
    if "HFPIPE_CACHE" not in os.environ:
        os.environ["HFPIPE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def environment(cache):
    """What a test, or a library in it, puts into the environment is not the next test's: PEFT's BOFT makes CXX a C compiler."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def hfpipe(
    *arguments: object,
    cwd: Path | None = None,
    check: int | None = 0,
    env: dict[str, str] | None = None,
    own_process: bool = False,
) -> subprocess.CompletedProcess:
    """The command line as a user has it; `check` is the exit code that is expected.

    It runs in this process, where the stack is imported already: most of a small command's time is that. Where a test
    changes the environment, which libraries read when they are imported, or asks for it, it runs in one of its own, or
    in the one of `WARM` with that environment.
    """
    command = ["hfpipe", *map(str, arguments)]
    if env and frozenset(env.items()) in WARM:
        done = subprocess.CompletedProcess(command, *WARM[frozenset(env.items())].call(command[1:], cwd or ROOT))
    elif env or own_process:
        line = [sys.executable, "-m", *command]
        done = subprocess.run(line, cwd=cwd or ROOT, env=os.environ | (env or {}), capture_output=True, text=True)
    else:
        done = subprocess.CompletedProcess(command, *call(command[1:], cwd or ROOT))
    if check is not None:
        assert done.returncode == check, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def stage_json(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())


def everything_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Each file of a folder by its path, with its size and when it was last written: what may not change."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory) -> Path:
    """`hfpipe run micro`, once for all tests that look at what it leaves. They must not change it."""
    own = tmp_path_factory.getbasetemp()
    whole = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "micro"  # of all workers
    with FileLock(f"{whole}.lock"):
        if not (whole / "stdout.txt").exists():
            done = hfpipe("run", "micro", "--out", whole)
            (whole / "stdout.txt").write_text(done.stdout)
    run = tmp_path_factory.mktemp("runs") / "micro"
    shutil.copytree(whole, run)  # each worker has its own: two commands on one folder keep each other out
    return run


@pytest.fixture
def own_run(micro_run, tmp_path) -> Path:
    """A finished run that a test may change, with weights that no other test has: a Hub takes the same bytes only once."""
    from safetensors.torch import load_file, save_file

    from hfpipe import artifact

    run = Path(shutil.copytree(micro_run, tmp_path / "micro"))
    for stage in ("pretrain", "midtrain", "sft", "dpo"):
        weights, record = run / stage / "model.safetensors", stage_json(run / stage)
        save_file(load_file(weights), weights, metadata={"format": "pt", "test": str(tmp_path)})
        record["files"] |= artifact.checksums(run / stage, [weights.name])
        record["parent"]["content"] = artifact.content_of(stage_json(run / record["parent"]["from"]))
        artifact.write_record(run / stage / artifact.STAGE_FILE, record)
    return run


@pytest.fixture
def recipe(tmp_path):
    """Writes a small recipe: `recipe({"sft": "..."})` replaces or adds stage files; returns its folder."""

    def write(files: dict[str, str] | None = None, base: str = "micro") -> Path:
        folder = tmp_path / "recipe"
        if not folder.exists():
            shutil.copytree(ROOT / "stage_configs" / base, folder)
        for name, text in (files or {}).items():
            (folder / f"{name}.yaml").write_text(text)
        return folder

    return write


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory):
    """Two Hubs of the tests' own, by how they take large files: {"lfs": ..., "xet": ...}."""
    from .localhub import LocalHub

    root = tmp_path_factory.mktemp("hubs")
    with LocalHub(root / "lfs") as lfs, LocalHub(root / "xet", xet=True) as xet:
        yield {"lfs": lfs, "xet": xet}


@pytest.fixture(params=["lfs", "xet"])
def hub(request, hub_server):
    """A test's Hub, once with LFS and once with Xet. Other tests use it too: take a `repo_id` of your own."""
    hub = hub_server[request.param]
    hub.reset()
    yield hub
    hub.reset()


@pytest.fixture(scope="session")
def hub_homes(tmp_path_factory):
    """A Hugging Face cache for each of the two Hubs; the processes that use them end with the session."""
    yield {mode: tmp_path_factory.mktemp(f"home-{mode}") for mode in ("lfs", "xet")}
    for process in WARM.values():
        process.close()


@pytest.fixture
def hub_env(request, hub, hub_homes) -> dict[str, str]:
    """What makes a process use `hub` as alice, with an empty Hugging Face cache."""
    home = hub_homes[request.node.callspec.params["hub"]]
    shutil.rmtree(home, ignore_errors=True)
    environment = hub.env() | {"HF_HOME": f"{home}", "HF_HUB_CACHE": f"{home}/hub", "HF_XET_CACHE": f"{home}/xet"}
    if frozenset(environment.items()) not in WARM:
        WARM[frozenset(environment.items())] = Warm(environment)
    return environment


@pytest.fixture
def repo_id() -> str:
    """The name of a repo that no other test has, in a namespace where alice may write."""
    return f"alice/r{next(REPO_NUMBERS)}"


CALL = {"type": "function", "function": {"name": "calculator", "arguments": "12 * 34"}}
TALKS = (
    [
        {"role": "user", "content": "What is 12 * 34?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "calculator", "content": "408"},
        {"role": "assistant", "content": "12 × 34 = 408"},
    ],
    [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help you?"}],
)


@pytest.fixture(scope="session")
def learned(micro_run, tmp_path_factory):
    """A small model that has learnt the two conversations above by heart: (folder, model, tokenizer)."""
    return learn_by_heart(micro_run, [{"messages": talk} for talk in TALKS], tmp_path_factory.mktemp("learned"))


def learn_by_heart(micro_run: Path, rows: list[dict], folder: Path):
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hfpipe.training.models import set_generation_config
    from hfpipe.training.templates import encode_batch

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(micro_run / "sft")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    set_generation_config(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        for ids, mask in encode_batch(tokenizer, rows):
            labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer
