"""BLEU of a corpus by sacrebleu, in 0..1; for `evaluate.load` with the path of this file."""

import datasets
import evaluate
import sacrebleu


class Bleu(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Post 2018, A Call for Clarity in Reporting BLEU Scores",
            inputs_description="predictions and references, a text each",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        return {"bleu": sacrebleu.corpus_bleu(predictions, [references]).score / 100}
