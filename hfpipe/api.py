"""hfpipe in Python: what the commands do, as objects that read well in a notebook and in a script.

    pipe = load_pipeline("tiny")
    run = pipe.run()  # or load_run("runs/tiny"), of one that is there already
    run.scorecard()
    run["sft"].chat("What is 12 * 34?")

Input at fault raises a `UserError` with the message that the command line prints, a stage that died a `StageFailed`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpipe import artifact
from hfpipe.apps.chat import Session, check_takes_turns, load
from hfpipe.apps.hub import notes_told, restore, status_rows
from hfpipe.config import load_recipe
from hfpipe.errors import Interrupted, StageFailed, UserError, check_type, nearest
from hfpipe.evaluation.scorecard import Scorecard, read_scorecard, result
from hfpipe.pipeline import open_recipe, plan_rows, report_run, run_and_report
from hfpipe.progress import find_display, quiet_imports
from hfpipe.publishing.figures import build_figure
from hfpipe.publishing.lineage import trace
from hfpipe.publishing.report import read_lines, read_stages
from hfpipe.run_folder import check_is_run
from hfpipe.stages import stage_types
from hfpipe.stages._run import check_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfpipe.apps.inspect import Inspected
    from hfpipe.sections import Recipe

__all__ = [
    "Model", "Pipeline", "Run", "Stage", "StageFailed", "UserError",
    "lineage", "load_model", "load_pipeline", "load_run", "pull",
]  # fmt: skip

quiet_imports()


@notes_told()
def load_pipeline(recipe: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Pipeline:
    """A recipe (a shipped one's name, or a folder with `pipeline.yaml`), checked as `hfpipe plan` checks it.

    `overrides` is `{"sft.trainer.learning_rate": 5e-4}`, or as for `--set`: `["sft.trainer.learning_rate=5e-4"]`.
    UserError tells everything that is at fault, one line each.
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    expected = 'a mapping, such as {"sft.trainer.learning_rate": 5e-4}'
    check_type("overrides", overrides, Sequence, expected)
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    for text in overrides:
        check_type("overrides", text, str, expected)
    check_recipe(load_recipe(recipe, stage_types(), overrides))
    return Pipeline(recipe, overrides)


def load_run(folder: str | Path) -> Run:
    """A run's folder, such as `runs/tiny`, finished or not; UserError where it is none."""
    run = _path("folder", folder)
    check_is_run(run)
    return Run(run)


def load_model(source: str | Path) -> Model:
    """Any model: a folder, or `org/model@revision` of the Hub. Nothing is loaded before it is used."""
    folder = _path("source", source)
    return Model(str(folder.absolute() if folder.exists() else source))


@notes_told()
def pull(source: str, out: str | Path | None = None) -> Run | Model:
    """`hfpipe pull`: a published run restored into `out` (by default `runs/RECIPE`), or one model; every file is verified.

    UserError where there is no such repo, where its files differ from their digests, or `out` holds something else.
    """
    check_type("source", source, str, "org/model@revision of the Hub")
    told = restore(source, _path("out", out) if out else None)
    return Run(told["run"]) if "run" in told else Model(str(told["folder"]))


@notes_told()
def lineage(source: str | Path) -> DataFrame:
    """`hfpipe lineage`: a row for each thing that was checked on the way from a model back to its raw data.

    `stage` and `where` it is, `what` was held against its hash, the `verdict` (`holds`, `broken`, `not here`) and `why`.
    """
    from pandas import DataFrame

    columns = ["stage", "where", "what", "verdict", "why"]
    rows = [(link.name, link.where, *check) for link in trace(str(source)) for check in link.checks]
    return DataFrame(rows, columns=columns).set_index(["stage", "what"])


class Pipeline:
    """A recipe with its overrides. Each call reads its files anew, so that an edit counts from the next one on."""

    def __init__(self, recipe: str | Path, overrides: list[str]):
        self._recipe, self._overrides = recipe, overrides

    def _open(self, out: str | Path | None) -> tuple[Recipe, Path]:
        return open_recipe(self._recipe, self._overrides, _path("out", out) if out else None)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join([repr(str(self._recipe)), *self._overrides])})"

    @notes_told()
    def plan(self, out: str | Path | None = None) -> DataFrame:
        """What `run(out)` would do, and why: a row a stage, with `status`, `why` and `notes`."""
        from pandas import DataFrame

        frame = DataFrame(plan_rows(*self._open(out))).set_index("stage")[["status", "why", "notes"]]
        return frame.assign(why=frame["why"].str.join("; "), notes=frame["notes"].str.join("; "))

    def run(
        self, out: str | Path | None = None, *, from_: str | None = None, to: str | None = None, only: str | None = None
    ) -> Run:
        """`hfpipe run`: bring every stage, or those `from_` one `to` another, or `only` one, to its end.

        `out` is the run's folder, by default `runs/RECIPE`. What is finished there and unchanged is skipped, and what was
        interrupted goes on from its last checkpoint. Each stage has a process of its own, which gives its memory back.

        Raises:
            UserError: the recipe or its data is at fault, or the folder is another recipe's.
            StageFailed: a stage's process died; the same call goes on.
        """
        recipe, folder = self._open(out)
        try:
            run_and_report(recipe, folder, find_display(), from_, to, only)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; the same call goes on from what is on disk.") from None
        return Run(folder)

    @notes_told()
    def inspect(self, stage: str, row: int = 1, out: str | Path | None = None) -> Inspected:
        """A training row as the model will see it, counted from 1; printed, what is trained stands in ⟦ ⟧.

        `out` is the run whose tokenizer is meant, where a stage of the recipe makes one.
        """
        from hfpipe.apps.inspect import find_rows

        check_type("row", row, Integral, "a number, counted from 1")
        return find_rows(*self._open(out), stage, row, row)[0]


class Model:
    """A model that answers, by the code behind `hfpipe chat` and `hfpipe eval`."""

    def __init__(self, source: str):
        self._source, self._since = source, time.time_ns()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._source!r})"

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        written = tuple(p.stat().st_mtime_ns for p in sorted(Path(self._source).expanduser().glob("*.safetensors")))
        return _load_once(self._source, written or (self._since,))

    def model(self) -> PreTrainedModel:
        """The model, as transformers has it: anew at each call, in eval mode, on the accelerator where there is one."""
        return load(self._source)[0]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, as transformers has it."""
        return self._loaded()[1]

    def session(self, system: str | None = None, max_new_tokens: int = 256) -> Session:
        """A conversation: `session.say(text).text` answers, `session.messages` keeps all turns and tool calls."""
        model, tokenizer = self._loaded()
        check_takes_turns(self._source, tokenizer)
        return Session(model, tokenizer, system, max_new_tokens)

    def chat(self, text: str, system: str | None = None, max_new_tokens: int = 256) -> str:
        """One answer, greedy; the calculator works when the model calls it. `max_new_tokens` counts for each turn of it.

        UserError where there is no model, where it takes no turns, or `text` is longer than it can read.
        """
        return self.session(system, max_new_tokens).say(text).text

    def score(self, probes: str | Path | None = None) -> DataFrame:
        """`hfpipe eval`: by capability the share right as `score`, its 95% interval `low` to `high`, and `n` questions.

        `probes` is a jsonl file or a `probes.yaml`; by default the built-in world's are asked.
        """
        from pandas import DataFrame

        from hfpipe.apps.compare import read_probes
        from hfpipe.evaluation.probes import score_probes

        found, _ = score_probes(*self._loaded(), *read_probes(str(probes) if probes else None))
        return DataFrame.from_dict(found, orient="index")[["score", "low", "high", "n"]].rename_axis("capability")


class Stage(Model):
    """What a finished stage left in `folder`, its `stage.json` as `record`, and its model."""

    def __init__(self, folder: Path, record: dict[str, Any]):
        super().__init__(str(folder))
        self.folder, self.record = folder, record
        self.metrics: dict[str, Any] = record["metrics"]  # steps, tokens, losses in nats per token
        self.eval: dict[str, Any] = artifact.read_json(folder / "eval.json") or {}  # none of a tokenizer
        self._leaves = stage_types()[record["type"]].leaves

    @property
    def samples(self) -> DataFrame:
        """Sampled answers, one a row: `asked`, `answer`, and where there is one the `reference`."""
        from pandas import DataFrame

        rows = read_lines(self.folder / "samples.jsonl")
        return DataFrame(rows, columns=None if rows else ["asked", "answer"])

    def __repr__(self) -> str:
        return f"Stage({self._source!r}: {result(self.metrics)})"

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._leaves != "model":
            raise UserError(f"{self.folder}: a {self.record['type']} stage leaves no model that answers.")
        return super()._loaded()

    def model(self) -> PreTrainedModel:
        """As of any `Model`; of a reward stage one that scores, an `AutoModelForSequenceClassification`."""
        if self._leaves == "tokenizer":
            raise UserError(f"{self.folder}: a tokenizer stage leaves no model.")
        return load(
            self._source, "AutoModelForCausalLM" if self._leaves == "model" else "AutoModelForSequenceClassification"
        )[0]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)


class Run:
    """A run's folder. `run["sft"]` is a finished stage, and iterating goes through their names in the recipe's order."""

    def __init__(self, folder: Path):
        self.folder, self._given = folder.absolute(), folder  # the working folder may change

    def __iter__(self) -> Iterator[str]:
        listed = (artifact.read_json(self.folder / "run.json") or {}).get("stages", [])
        return (name for name in listed if artifact.read_record(self.folder / name / artifact.STAGE_FILE))

    def __getitem__(self, name: str) -> Stage:
        if name not in self:
            raise UserError(
                f"{name} is no finished stage of {self._given}, which has {', '.join(self) or 'none'}.{nearest(name, self)}"
            )
        return Stage(self.folder / name, artifact.read_record(self.folder / name / artifact.STAGE_FILE) or {})

    def __repr__(self) -> str:
        return f"Run({str(self._given)!r}: {', '.join(self) or 'no finished stage'})"

    def _card(self) -> Scorecard:
        check_is_run(self.folder)
        card = read_scorecard(self.folder)
        if not card.stages:
            raise UserError(
                f"{self._given} holds no finished stage that left a language model; status() tells how far it is."
            )
        return card

    def scorecard(self, long: bool = False) -> DataFrame:
        """Share of held-out questions answered rightly, 0 to 1: capabilities down, stages across.

        With `long` a row a score, with its 95% interval `low` to `high`, `n` questions, the `change` from the stage it
        starts from, and an `arrow` where 0 lies outside that change's interval. UserError where no model is finished.
        """
        return self._card().as_frame(long)

    def status(self) -> DataFrame:
        """`hfpipe status`: where each stage stands, and its `commit` where the Hub holds it as it is here."""
        from pandas import DataFrame

        return DataFrame(status_rows(self.folder)).set_index("stage").fillna("")

    def push(
        self, repo_id: str | None = None, *, private: bool | None = None, stages: Sequence[str] | None = None
    ) -> DataFrame:
        """`hfpipe push`: publish the finished stages, or those named, that the Hub does not hold as they are here.

        `private`: as the recipe says where it is None, and private where that says nothing.
        Returns `repo_id`, `revision` and `commit` of each. With nothing to send it changes nothing.

        Raises:
            UserError: no token, no repo named, or the Hub says no.
            StageFailed: not everything got through; the same call sends the rest.
        """
        from pandas import DataFrame

        check_type("repo_id", repo_id, (str, type(None)), "NAMESPACE/NAME, such as me/tiny")
        check_type("private", private, (bool, type(None)), "True or False")
        check_type("stages", stages, (Sequence, type(None)), "names of stages")
        # A process of its own: its watchdog ends it where the Hub hangs.
        command = [sys.executable, "-m", "hfpipe", "push", str(self.folder), "--json"]
        command += ["--repo-id", repo_id] if repo_id else []
        command += [] if private is None else ["--no-public" if private else "--public"]
        for stage in [stages] if isinstance(stages, str) else stages or []:
            command += ["--stage", str(stage)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().removeprefix("hfpipe: ") or done.stdout.strip()
            raise UserError(said) if done.returncode == 2 else StageFailed(said)
        return DataFrame(json.loads(done.stdout)).set_index("stage")

    def curves(self) -> DataFrame:
        """What was logged in training, a row each: `stage`, `step`, `loss` in nats per token, `learning_rate` and so on."""
        from pandas import DataFrame

        rows = [{"stage": s, **line} for s in self for line in read_lines(self.folder / s / "metrics.jsonl")]
        return DataFrame(rows, columns=None if rows else ["stage", "step", "loss"])

    def plot(self) -> Figure:
        """The report's curves above its heat map; a notebook shows the figure where it is a cell's last value."""
        return build_figure(read_stages(self.folder), self._card())

    def report(self) -> Path:
        """Write `report.html` anew, one file with the whole story in it; its path."""
        return report_run(self.folder)[1]


def _path(name: str, value: Any) -> Path:
    check_type(name, value, (str, os.PathLike), "a folder's path")
    return Path(value).expanduser()


@functools.lru_cache(maxsize=1)
def _load_once(source: str, written: tuple[int, ...]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model spoken to last stays in memory; one made anew was `written` at another time, and a branch may have moved."""
    return load(source)
