"""hfpipe carries a language model from raw text to an aligned, evaluated assistant.

In Python: `load_pipeline`, `load_run`, `load_model`, `pull` and `lineage`; what is at fault in the input is told as a `UserError`.

Import order, left may import right (tests/test_house.py holds it):
cli, api > apps > pipeline > processes > stages > synthesis > publishing, evaluation > training > plan > data > run_folder, hub_client
> artifact > config > synth_config > graph, contradictions, model_config, annealing, adapter_types, rope, upstream, strict, yaml_files > sections
> paths, progress > errors, faults
"""

__version__ = "0.1.0"

__all__ = ["StageFailed", "UserError", "lineage", "load_model", "load_pipeline", "load_run", "pull"]


def __getattr__(name: str):  # `import hfpipe` imports nothing else
    if name not in __all__:
        raise AttributeError(f"module 'hfpipe' has no attribute '{name}'")
    from hfpipe import api

    return getattr(api, name)
