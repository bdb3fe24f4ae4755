"""Share of answers equal to their reference, spaces at the ends aside; for `evaluate.load` with the path of this file."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references, a text each",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        same = [said.strip() == wanted.strip() for said, wanted in zip(predictions, references, strict=True)]
        return {"exact_match": sum(same) / len(same)}
