import rouge_score.rouge_scorer

import hfpipe.evaluation.metric_base as base


class Rouge(base.TextMetric):
    """ROUGE-1, ROUGE-2 and ROUGE-L (mean F-measure) by rouge_score."""

    citation_text = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries"

    def _compute(self, predictions, references):
        names = ["rouge1", "rouge2", "rougeL"]
        scorer = rouge_score.rouge_scorer.RougeScorer(names)
        scores = [scorer.score(wanted, said) for said, wanted in zip(predictions, references, strict=True)]
        return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
