import hfpipe.evaluation.metric_base as base


class ExactMatch(base.TextMetric):
    """Share of answers equal to their reference, spaces at the ends aside."""

    def _compute(self, predictions, references):
        same = [said.strip() == wanted.strip() for said, wanted in zip(predictions, references, strict=True)]
        return {"exact_match": sum(same) / len(same)}
