import sacrebleu

import hfpipe.evaluation.metric_base as base


class Bleu(base.TextMetric):
    """BLEU of a corpus by sacrebleu, in 0..1."""

    citation_text = "Post 2018, A Call for Clarity in Reporting BLEU Scores"

    def _compute(self, predictions, references):
        return {"bleu": sacrebleu.corpus_bleu(predictions, [references]).score / 100}
