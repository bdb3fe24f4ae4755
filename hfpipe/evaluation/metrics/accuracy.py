"""Accuracy of labels, each a word, by scikit-learn; for `evaluate.load` with the path of this file."""

import datasets
import evaluate
import sklearn.metrics


class Accuracy(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references, a label each",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}
