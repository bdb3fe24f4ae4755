import sklearn.metrics

import hfpipe.evaluation.metric_base as base


class Accuracy(base.TextMetric):
    """Accuracy of labels, each a word, by scikit-learn."""

    def _compute(self, predictions, references):
        return {"accuracy": float(sklearn.metrics.accuracy_score(references, predictions))}
