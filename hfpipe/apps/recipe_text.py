"""The files of a new recipe as text: each number with the reason for it, and the arithmetic where there is some."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from hfpipe.plan.sizing import MOST_PASSES, SMALL, batch_tokens, learning_rate
from hfpipe.progress import duration, quantity

if TYPE_CHECKING:
    from hfpipe.apps.drafts import Choice, Draft

_TEACHES = {
    "tokenizer": "Byte-level BPE; digits one by one, control tokens one id each.",
    "pretrain": "Language: {params} parameters from scratch.",
    "midtrain": "Structure: roles, turns, tools, formats; with replayed text against forgetting.",
    "sft": "Behaviour, by demonstration; the loss falls on the assistant's words alone.",
    "reward": "A score for answers, learnt from pairs.",
    "dpo": "Preferences: the better of two answers. The reference is the model that it starts from.",
    "kto": "Preferences, from answers judged one by one.",
}
_DOMAIN = "Your own text, for a model that has its language already; rows are plain documents."
_PACKED = ("midtrain", "sft")


def pipeline_text(draft: Draft) -> str:
    material, devices = draft.material, draft.devices
    what = f"from {draft.origin}" if draft.origin else "from scratch"
    lines = [
        f"# {quantity(draft.params)} parameters {what}, planned for {devices.label}. Written by:",
        f"#   {draft.command}",
    ]
    plain = draft.name[0].isalpha() and draft.name.lower() not in ("null", "true", "false")
    name = draft.name if plain else json.dumps(draft.name, ensure_ascii=False)  # 123 and 1e5 are numbers in YAML
    lines += [f"name: {name}", f"stages: [{', '.join(draft.stages)}]", "seed: 0"]
    if material.own:
        lines.append(f"settings: {{data_dir: {json.dumps(str(material.data_dir))}}}")
    if devices.count > 1:
        config, why = "", "one model on each device, gradients shared"
        if draft.sharded:
            state = 16 * draft.params / 1e9
            why = f"weights, gradients and AdamW's two moments are 16 bytes a parameter, {state:.0f} GB: divided by {devices.count}"
            config = ", accelerate_config: fsdp2"
        lines.append(_line(0, "launch", f"{{processes: {devices.count}{config}}}", why))
    lines.append("evaluate:")
    if material.tiny:
        lines += [
            "  probes:",
            "    - {path: tinyworld/probes, split: test, limit: 310}  # 31 kinds of question, 10 of each",
        ]
    if material.text:
        lines += ["  text:  # perplexity after every stage shows what it made the model forget"]
        lines += [f"    - {{{body}}}" for body in material.text]
    return "\n".join([*lines, "  samples: 5"]) + "\n"


def stage_text(draft: Draft, name: str) -> str:
    domain = name == "midtrain" and _is_domain(draft)
    lines = [f"# {_DOMAIN if domain else _TEACHES[name].format(params=quantity(draft.params))}", f"stage: {name}"]
    if name == "tokenizer":
        words, width = draft.config["vocab_size"], draft.shape.hidden_size
        why = f"{words:,} x {width} = {quantity(words * width)}, {words * width / draft.params:.0%} of the parameters"
        lines += ["tokenizer:", "  type: bpe", _line(2, "vocab_size", words, why), "  chat_template: hfpipe"]
        return "\n".join([*lines, *_data(draft, name)]) + "\n"
    chosen = draft.choices[name]
    rate, why = learning_rate(name, draft.params, draft.adapter)
    lines += [*_model(draft, name), *_data(draft, name)]
    if name == "pretrain" and draft.params < SMALL:
        lines.append(
            "optimizer: {type: muon, lr: 0.02}  # orthogonal updates of the hidden matrices: far fewer steps at this size"
        )
    if draft.adapter:
        lines.append(
            "adapter: {type: lora, r: 16, lora_alpha: 32, target_modules: all-linear}  # merged when the stage ends"
        )
    lines += ["trainer:", _line(2, "learning_rate", _scientific(rate), why), *_options(draft, name, chosen)]
    return "\n".join(lines) + "\n"


# --- sections ---


def _model(draft: Draft, name: str) -> list[str]:
    eager = [
        "  attn_implementation: eager  # on a CPU, at this size, a third faster than sdpa",
        "  compile_blocks: true  # the blocks' passes in training: a tenth to two fifths of a step less, for half a minute once",
    ]
    eager = eager if draft.devices.key == "cpu" and draft.params < SMALL else []
    if name != "pretrain":
        before = [s for s in draft.stages[: draft.stages.index(name)] if s != "reward"]
        origin = json.dumps(draft.origin) if str(draft.origin).startswith("/") else draft.origin
        lines = ["model:", f"  from: {before[-1] if before else origin}", *eager]
        if not before and draft.needs_template:
            lines.append("tokenizer: {chat_template: chatml}  # the model comes without one")
        return lines
    c = draft.config
    width, layers, heads, kv = (
        c[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    words, ffn = c["vocab_size"] * width, c["intermediate_size"]
    shared = (
        "each has its own keys and values: at this size they cost little"
        if heads == kv
        else (f"{heads // kv} query heads share one: the cache is {heads // kv} times smaller")
    )
    share = words / draft.params
    tie = (
        f"one table for input and output: another would be {share:.0%}"
        if c["tie_word_embeddings"]
        else f"two tables, {2 * share:.0%}"
    )
    whys = {
        "hidden_size": f"{heads} heads of {width // heads}",
        "num_hidden_layers": f"{width} / {layers} = {width / layers:.0f}: GPT-2 has 64 at 125M parameters, Llama 128 from 7B on",
        "num_key_value_heads": shared,
        "intermediate_size": f"{ffn / width:.2f} widths, usual are 2.67: it makes up the {quantity(draft.params)} parameters",
        "max_position_embeddings": "tokens that the model can read",
        "tie_word_embeddings": f"{tie} of the parameters",
    }  # fmt: skip
    config = [_line(4, key, str(c[key]).lower(), whys.get(key)) for key in ("model_type", *whys)]
    config.insert(3, f"    num_attention_heads: {heads}")
    return ["model:", "  from: tokenizer", *eager, "  config:", *config]


def _data(draft: Draft, name: str) -> list[str]:
    material, lines = draft.material, ["data:"]
    if name == "pretrain":
        chosen, length = draft.choices[name], draft.row_length(name)
        batch = chosen.rows * chosen.accumulation * draft.devices.count * length
        best = batch_tokens(draft.params, draft.tokens)
        sum_ = f"0.292 x (6 x {quantity(draft.params)} x {quantity(draft.tokens)})^0.3271 = {quantity(best)}"
        short = (
            "tokens of a packed row: these documents are short"
            if material.tiny
            else "tokens of a packed row: the whole context"
        )
        lines += [_line(2, "max_length", length, short)]
        lines += [
            _line(
                2,
                "batch_tokens",
                batch,
                f"best for the FLOPs is {sum_}; {batch // length} rows: a power of two a device",
            )
        ]
        if material.streaming:
            lines.append("  streaming: true  # read while training, not stored first")
    if material.bad_rows and name not in ("tokenizer", "pretrain"):
        lines.append(
            _line(2, "max_bad_rows", material.bad_rows, "the share that may be left out, most for being too long")
        )
    rows, replay = material.rows_for(name), material.replay if name in _PACKED and not draft.adapter else []
    if name == "midtrain" and _is_domain(draft):
        rows, replay = [f"{body}, as: text" for body in material.rows_for("pretrain")], []
    weights = (
        ("", "")
        if material.counted or not replay
        else (f", weight: {0.9 / len(rows):g}", f", weight: {0.1 / len(replay):g}")
    )
    lines += ["  train:", *(f"    - {{{body}{weights[0]}}}" for body in rows)]
    lines += [f"    - {{{body}{weights[1]}}}  # replay: a tenth of text keeps the language" for body in replay]
    if evals := material.evals.get("pretrain" if name == "midtrain" and _is_domain(draft) else name):
        text = ", as: text" if name == "midtrain" and _is_domain(draft) else ""
        lines += ["  eval:", *(f"    - {{{body}{text}}}" for body in evals)]
    return lines


def _options(draft: Draft, name: str, chosen: Choice) -> list[str]:
    quote, ranks = chosen.quote, draft.devices.count
    steps = (quote and quote.work.steps) or chosen.steps or 0
    rows = chosen.rows * chosen.accumulation * ranks
    lines, share = [], 0.05 if steps < 2000 else 0.02
    if name == "pretrain":
        lines += [
            "  adam_beta2: 0.95  # GPT-3's: a spike is forgotten within some 20 steps",
            "  weight_decay: 0.1  # GPT-3's",
        ]
    lines += ["  lr_scheduler_type: cosine_with_min_lr  # it falls with the last step, not before or after: Chinchilla"]
    lines += ["  lr_scheduler_kwargs: {min_lr_rate: 0.1}"]
    lines += [
        _line(
            2,
            "warmup_steps",
            share,
            f"of all steps, about {max(round(steps * share), 1)}: AdamW's averages are not settled yet",
        )
    ]
    if chosen.steps is None:
        epochs = 1 if draft.material.tiny or name != "sft" else 2
        about = f"about {steps} steps of {rows} rows" + (
            "; few rows are learnt by heart in more than 5" if epochs > 1 else ""
        )
        lines.append(_line(2, "num_train_epochs", epochs, about))
    else:
        lines.append(_line(2, "max_steps", chosen.steps, _why_steps(draft, name, chosen, rows)))
    if name in _PACKED:
        lines += [_line(2, "max_length", draft.length, "tokens of a packed row"), "  packing: true"]
    elif name != "pretrain":
        lines += [_line(2, "max_length", draft.length, "tokens of a prompt with an answer")]
    if name in ("dpo", "kto"):
        lines += ["  beta: 0.1  # how far from the reference: lower is farther"]
    if name == "dpo":
        lines += [
            "  loss_type: [sigmoid, sft]  # and the likelihood of the better answer, which else falls with the other's"
        ]
        lines += ["  loss_weights: [1.0, 1.0]"]
    fits = f"up to {quote.largest:,} fit into {draft.devices.memory:.0f} GB; " if quote and quote.largest else ""
    passes = f"{fits}{ranks} x {chosen.rows} x {chosen.accumulation} passes = {rows} rows a step"
    lines.append(_line(2, "per_device_train_batch_size", chosen.rows, passes))
    if name != "pretrain":
        lines.append(_line(2, "gradient_accumulation_steps", chosen.accumulation))
    why = (
        "without it not one row fits: a third more work for far less memory"
        if chosen.checkpointing
        else "it fits without"
    )
    lines.append(_line(2, "activation_checkpointing", str(chosen.checkpointing).lower(), why))
    every = min(max(steps // 20, 50), 1000)
    lost = f", of about {duration(quote.seconds / steps * every)}," if quote and quote.seconds and steps else ""
    lines.append(_line(2, "save_steps", every, f"a killed run loses so many{lost} at the most"))
    return lines


def _why_steps(draft: Draft, name: str, chosen: Choice, rows: int) -> str:
    if name == "pretrain":
        each = rows * draft.row_length(name)
        ratio = draft.tokens / draft.params
        bound = f"; the text holds no more, read {MOST_PASSES} times over" if draft.bound else ""
        return f"{ratio:.3g} tokens x {quantity(draft.params)} parameters / {each:,} tokens a step{bound}"
    if name in _PACKED:
        return f"{quantity(chosen.steps * rows * draft.length)} tokens / ({rows} x {draft.length:,}) a step"
    return f"{chosen.steps * rows:,} of the pairs"


def _is_domain(draft: Draft) -> bool:
    return draft.origin is not None and draft.material.own


def _line(indent: int, key: str, value: Any, why: str | None = None) -> str:
    return f"{' ' * indent}{key}: {value}" + (f"  # {why}" if why else "")


def _scientific(rate: float) -> str:
    """`6.0e-4`."""
    return re.sub(r"e-0?", "e-", f"{rate:.1e}")
