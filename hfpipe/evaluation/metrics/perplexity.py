import math

import datasets
import evaluate


class Perplexity(evaluate.Metric):
    """Perplexity of texts by the log-likelihoods (in nats) that a model gives to their tokens."""

    def _info(self):
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: the log-likelihoods of each text's tokens",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, predictions):
        tokens = [value for text in predictions for value in text]
        return {"perplexity": math.exp(-sum(tokens) / len(tokens))}
