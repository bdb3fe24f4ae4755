"""hfpipe carries a language model from raw text to an aligned, evaluated assistant.

Import order, left may import right (tests/test_house.py holds it):
cli > apps > pipeline > processes > stages > publishing, evaluation > training > plan > data > run_folder, hub_client > artifact
> config > graph, contradictions, adapter_types, upstream, strict, yaml_files > sections > paths, progress > errors, faults
"""

__version__ = "0.1.0"
