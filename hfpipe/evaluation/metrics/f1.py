import sklearn.metrics

import hfpipe.evaluation.metric_base as base


class F1(base.TextMetric):
    """Macro-averaged F1 of labels, each a word, by scikit-learn."""

    def _compute(self, predictions, references):
        return {"f1": float(sklearn.metrics.f1_score(references, predictions, average="macro"))}
