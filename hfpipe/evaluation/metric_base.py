"""What the modules of `metrics/` share. They import this file as a module: `evaluate` takes the first metric class it finds."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate


class TextMetric(evaluate.Metric):
    """A metric of answers against references, a text each; a subclass has a docstring and `_compute`."""

    citation_text = ""

    def _info(self) -> Any:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=self.citation_text,
            inputs_description="predictions and references, a text each",
            features=datasets.Features({"predictions": text, "references": text}),
        )
