"""From a number of parameters to a recipe's figures: shape, vocabulary, context, batch, learning rates; each by a published rule.

Width over depth: 64 at 125M (GPT-2: 768 / 12), 128 from 7B on (Llama 2 7B: 4096 / 32), by the sixth root between and below.
Vocabulary: its table takes 1.77e9 (N / 70e9)^0.83 parameters: the optimum grows with that exponent, and is 216k entries for
Llama 2 70B (Tao et al. 2024, arXiv:2407.13623). Queries share keys and values by fours from 50M on (Ainslie et al. 2023,
arXiv:2305.13245). The gated MLP is some 8/3 as wide as the model (Shazeer 2020, arXiv:2002.05202): it takes what is left, so that the
sum is what was asked for. The batch is 0.292 C^0.3271 tokens for C FLOPs (DeepSeek LLM, arXiv:2401.02954).
"""

from __future__ import annotations

import math
from typing import Any

from hfpipe.errors import UserError
from hfpipe.plan.advice import usual_peak
from hfpipe.plan.scaling import FLOPS_PER_PARAMETER_AND_TOKEN
from hfpipe.plan.shapes import Shape, read_shape

SMALLEST, LARGEST = 2e5, 1e12  # parameters
SMALL = 10e6  # below, what the shipped recipes of that size have been tuned to
_MLP = 8 / 3
# Of the usual peak of pretraining at the size. The small ones see few rows, and learn little from them at the large ones' rates.
_SHARES = {"pretrain": 1.0, "midtrain": 0.3, "sft": 0.1, "reward": 0.1, "dpo": 0.01, "kto": 0.01}
_SMALL_SHARES = {"pretrain": 1.0, "midtrain": 0.6, "sft": 0.3, "reward": 0.25, "dpo": 0.1, "kto": 0.1}
MOST_PASSES = 4  # over the same text, nearly as good as new: Muennighoff et al. 2023, arXiv:2305.16264
ADAPTER = 10  # times the rate of whole training: Schulman et al. 2025, "LoRA Without Regret"


def choose_shape(params: float, most_words: int | None = None) -> tuple[dict[str, Any], Shape]:
    """Llama's configuration of so many parameters, counted to within 5%, with its `vocab_size`; and the model that it makes.

    Args:
        most_words: entries of the vocabulary at the most, where the text is worth no more.
    Raises:
        UserError: fewer or more than the rules hold for.
    """
    if not SMALLEST <= params <= LARGEST:
        raise UserError(f"{params:g} parameters: expected from {SMALLEST:g} to {LARGEST:g}, such as --params 125M.")
    head_dim = 32 if params < SMALL else 64 if params < 1.5e9 else 128
    aspect = min(64 * (params / 125e6) ** (1 / 6), 128)
    found = []
    for heads in range(2, 257):
        hidden, group = heads * head_dim, 1
        if params >= 50e6:
            group = next((g for g in (4, 3, 2) if heads % g == 0), 0)
        if not group:
            continue
        base = {
            "model_type": "llama",
            "vocab_size": _words(params, hidden, most_words),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // group,
            "max_position_embeddings": context(params),
            "tie_word_embeddings": params < 5e9,
        }
        for layers in {max(int(hidden / aspect), 2), max(math.ceil(hidden / aspect), 2)}:
            if config := _fill(base, layers, params):
                wide = config["intermediate_size"] / hidden
                found.append((abs(math.log(wide / _MLP)) + abs(math.log(hidden / layers / aspect)), hidden, config))
    config = min(found, key=lambda item: item[:2])[2]
    return config, read_shape(config)


def _words(params: float, hidden: int, most: int | None) -> int:
    words = round(1.77e9 * (params / 70e9) ** 0.83 / hidden / 128) * 128  # tensor cores like multiples
    return min(max(words, 512), most or words)


def _fill(base: dict[str, Any], layers: int, params: float) -> dict[str, Any] | None:
    """The configuration with an MLP of what the rest leaves; None where that is no MLP to speak of."""
    hidden = base["hidden_size"]
    unit = 16 if hidden < 512 else 64 if hidden < 2048 else 256
    bare = read_shape({**base, "num_hidden_layers": 1, "intermediate_size": 0})
    block = sum(weight.numel for weight in bare.weights.values() if weight.block is not None)
    left = params - (bare.total - block) - layers * block
    width = round(left / (3 * hidden * layers) / unit) * unit
    return {**base, "num_hidden_layers": layers, "intermediate_size": width} if width >= hidden else None


def context(params: float) -> int:
    """Tokens that a model of the size is made to read."""
    return 512 if params < SMALL else 1024 if params < 100e6 else 2048 if params < 1e9 else 4096


def batch_tokens(params: float, tokens: float) -> float:
    """Tokens of a step that are best for a training on `tokens`."""
    return 0.292 * (FLOPS_PER_PARAMETER_AND_TOKEN * params * tokens) ** 0.3271


def learning_rate(stage: str, params: float, adapter: bool = False) -> tuple[float, str]:
    """The peak for a type of stage at a size, to two digits, and its reason."""
    share = (_SMALL_SHARES if params < SMALL else _SHARES)[stage]
    rate = share * usual_peak(params) * (ADAPTER if adapter else 1)
    why = "6e-4 x (parameters / 125M)^(-1/3): GPT-3's table"
    if share < 1:
        why = f"{share:g} of pretraining's usual {usual_peak(params):.2g}: it changes what is there, and should not overwrite it"
    return float(f"{rate:.2g}"), why + (f"; x {ADAPTER} for an adapter" if adapter else "")


def power_of_two(number: float) -> int:
    """The largest power of two that is not above `number`; at least 1."""
    return 2 ** int(math.log2(max(number, 1)))
