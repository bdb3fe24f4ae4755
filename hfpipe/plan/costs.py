"""FLOPs of a whole stage by what they are for, and the time that they take on a device."""

from __future__ import annotations

from hfpipe.plan import flops
from hfpipe.plan.devices import Devices
from hfpipe.plan.memory import Setting, kv_cache
from hfpipe.plan.shapes import Shape
from hfpipe.plan.trained import Trained
from hfpipe.plan.workload import BY_REWARDS, Work, option, recomputes, rollout_rows
from hfpipe.sections import Stage


def stage_flops(stage: Stage, shape: Shape, trained: Trained, work: Work) -> dict[str, float]:
    """FLOPs of a stage by what they are for."""
    name, tokens, length = stage.type.name, work.places, work.length
    found = {"training": flops.training(shape, trained, tokens, length, recomputes(stage))}
    if name in ("dpo", "kto"):
        passes = 1 / work.epochs if precomputes(stage) and work.epochs else 1
        found["reference"] = passes * flops.forward(shape, tokens, length)
        if name == "kto":
            found["kl"] = flops.forward(shape, tokens, length)  # another's answer to each prompt
    if name == "distill":
        completion = option(stage, "max_completion_length") or 256
        found["generation"] = flops.generation(
            shape, max(length - completion, 1), completion, work.steps * work.rows_per_step
        )
        found["teacher"] = flops.forward(shape, tokens, length)
    if name in BY_REWARDS:
        completion = option(stage, "max_completion_length") or 256
        iterations = option(stage, "num_iterations") or 1
        rows = work.steps * work.rows_per_step / iterations
        prompt = max(tokens / (rows * iterations) - completion, 1)
        once = tokens / iterations
        found["generation"] = flops.generation(shape, prompt, completion, rows)
        found["old_log_probs"] = flops.forward(shape, once, length) if iterations > 1 or name == "ppo" else 0.0
        found["reference"] = flops.forward(shape, once, length) if option(stage, "beta") else 0.0
        if stage.sections["rewards"].model:
            found["reward_model"] = flops.forward(shape, once, length, head_tokens=0)
        if name == "ppo" and option(stage, "critic") != "head":
            whole = Trained(frozenset(shape.weights))
            found["critic"] = flops.training(shape, whole, tokens, length) + flops.forward(
                shape, once, length, head_tokens=0
            )
    return found


def precomputes(stage: Stage) -> bool:
    """Whether a preference stage asks its reference once, before it trains, as the stages' files have it."""
    if stage.type.name not in ("dpo", "kto"):
        return False
    return bool(stage.trainer.get("precompute_ref_log_probs", stage.adapter is None))


def stage_seconds(
    stage: Stage, shape: Shape, work: Work, costs: dict[str, float], dtype: str, devices: Devices, setting: Setting
) -> float:
    """FLOPs at the devices' rate; sampling at that of their memory where this is the slower: each token reads all weights."""
    sampling = costs.get("generation", 0.0)
    seconds = devices.seconds(sum(costs.values()) - sampling, dtype)
    decoding = 0.0
    if sampling and devices.bandwidth:
        iterations, completion = option(stage, "num_iterations") or 1, option(stage, "max_completion_length") or 256
        at_once = rollout_rows(stage, work) * devices.count
        rollouts = work.steps * work.rows_per_step / iterations / at_once
        cached = kv_cache(shape, at_once // devices.count, work.length, setting.width) / 2
        decoding = rollouts * completion * (setting.stored * shape.total + cached) / (devices.bandwidth * 1e9)
    return seconds + max(devices.seconds(sampling, dtype), decoding)
