"""ROUGE-1, ROUGE-2 and ROUGE-L (mean F-measure) by rouge_score; for `evaluate.load` with the path of this file."""

import datasets
import evaluate
import rouge_score.rouge_scorer


class Rouge(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="predictions and references, a text each",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        names = ["rouge1", "rouge2", "rougeL"]
        scorer = rouge_score.rouge_scorer.RougeScorer(names)
        scores = [scorer.score(wanted, said) for said, wanted in zip(predictions, references, strict=True)]
        return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}
