"""Upstream's option classes, read from their installed source without importing them (importing TRL takes seconds)."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import math
from dataclasses import dataclass
from pathlib import Path

from hfpipe.errors import nearest

# class -> (package, file): where the pinned versions keep those whose file does not follow from their name.
_FILES = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "PreTrainedConfig": ("transformers", "configuration_utils.py"),
    "PeftConfigMixin": ("peft", "config.py"),
    "PeftConfig": ("peft", "config.py"),
    "PromptLearningConfig": ("peft", "config.py"),
    "LycorisConfig": ("peft", "tuners/lycoris_utils.py"),
    "BottleneckConfig": ("hfpipe", "training/bottleneck.py"),
    "GRPOConfig": ("trl", "trainer/grpo_config.py"),
    "PPOConfig": ("hfpipe", "training/ppo.py"),
}
# enum of admitted words -> (package, file)
_ENUMS = {
    "SchedulerType": ("transformers", "trainer_utils.py"),
    "IntervalStrategy": ("transformers", "trainer_utils.py"),
    "SaveStrategy": ("transformers", "trainer_utils.py"),
    "OptimizerNames": ("transformers", "training_args.py"),
}
# Values below these are accepted by upstream's classes and fail, or train nothing, much later.
_AT_LEAST = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 2,
    "logging_steps": 0,
    "weight_decay": 0,
    "r": 1,
    "num_virtual_tokens": 1,
    "adapter_len": 1,
    "adapter_layers": 1,
    "tasks": 1,
    "n_grams": 1,
    "num_buckets": 1,
    "hashes_per_bucket": 1,
    "hidden_size": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "n_embd": 1,
    "n_head": 1,
}
# Words that upstream's classes take without a look.
_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_WORDS = {
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
}
# name in `report_to` -> the packages of which one is enough, where that is not its own name
_REPORT_PACKAGES = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
}
_SCALARS = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": dict, "list": list, "None": type(None)}


@dataclass(frozen=True)
class Field:
    """One option of an upstream class: `types` is None when its annotation is too rich to check here."""

    annotation: str
    types: tuple[type, ...] | None
    choices: tuple[object, ...] = ()
    default: object = None  # where it is written as a literal


def _package_file(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(spec.origin).parent / file


def _types(annotation: ast.expr) -> tuple[tuple[type, ...] | None, tuple[object, ...]]:
    """The plain types and the literal choices that an annotation admits."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        left, right = _types(annotation.left), _types(annotation.right)
        known = left[0] is not None and right[0] is not None
        return (left[0] + right[0] if known else None), left[1] + right[1]
    if isinstance(annotation, ast.Subscript):
        name = ast.unparse(annotation.value)
        if name == "Literal":
            members = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            choices = tuple(m.value for m in members if isinstance(m, ast.Constant))
            return tuple({type(c) for c in choices}), choices
        if name in ("Optional", "Union"):
            members = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            parts = [_types(m) for m in members]
            if any(p[0] is None for p in parts):
                return None, ()
            none = (type(None),) if name == "Optional" else ()
            return sum((p[0] for p in parts), none), sum((p[1] for p in parts), ())
        annotation = annotation.value
    name = ast.unparse(annotation)
    if name in _ENUMS:
        return (str,), _enum_values(name)
    if name not in _SCALARS:
        return None, ()
    kind = _SCALARS[name]
    return (kind if isinstance(kind, tuple) else (kind,)), ()


@functools.cache
def _enum_values(class_name: str) -> tuple[str, ...]:
    tree = ast.parse(_package_file(*_ENUMS[class_name]).read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    values = (i.value for i in node.body if isinstance(i, ast.Assign))
    return tuple(v.value for v in values if isinstance(v, ast.Constant))


def _fields_in(path: Path, class_name: str) -> dict[str, Field]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    found: dict[str, Field] = {}
    for base in node.bases:
        name = ast.unparse(base)
        if name in _FILES or (path.is_relative_to(_package_file("peft", "")) and name in _peft_files()):
            found |= fields(name)
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        annotation = ast.unparse(item.annotation)
        if annotation.startswith("ClassVar") or item.target.id.startswith("_") or "init=False" in ast.unparse(item):
            continue
        types, choices = _types(item.annotation)
        if types and "'const': True" in ast.unparse(item):  # the flag alone, on upstream's command line
            types += (bool,)
        found[item.target.id] = Field(annotation, types, choices, _default(item.value))
    return found


def _default(value: ast.expr | None) -> object:
    """Of `x: int = 1` and of `x: int = field(default=1)`."""
    if isinstance(value, ast.Call):
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    try:
        return ast.literal_eval(value) if value else None
    except ValueError:
        return None


@functools.cache
def fields(class_name: str) -> dict[str, Field]:
    """Option name -> Field of `SFTConfig`, `LoraConfig` ..., inherited ones included."""
    trl_file = ("trl", f"trainer/{class_name.removesuffix('Config').lower()}_config.py")
    package, file = _FILES.get(class_name) or _peft_files().get(class_name, trl_file)
    return _fields_in(_package_file(package, file), class_name)


@functools.cache
def peft_methods() -> dict[str, str]:
    """Name of every method of PEFT -> its configuration class, as the calls of `register_peft_method` give them."""
    found = {}
    for file in _package_file("peft", "tuners").glob("*/__init__.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "register_peft_method":
                given = {word.arg: word.value for word in node.keywords}
                found[ast.literal_eval(given["name"])] = ast.unparse(given["config_cls"])
    return found


@functools.cache
def _peft_files() -> dict[str, tuple[str, str]]:
    """Configuration class of a PEFT method -> (package, file)."""
    files = _package_file("peft", "tuners").glob("*/config.py")
    text = {f"tuners/{file.parent.name}/config.py": file.read_text(encoding="utf-8") for file in files}
    return {
        name: ("peft", next(file for file in text if f"class {name}(" in text[file]))
        for name in peft_methods().values()
    }


@functools.cache
def peft_targets(method: str, kind: str = "TARGET") -> dict[str, list[str]]:
    """Model type -> the modules that PEFT adapts where none are named: of `LORA`, of `IA3` and its `FEEDFORWARD`."""
    tree = ast.parse(_package_file("peft", "utils/constants.py").read_text(encoding="utf-8"))
    name = f"TRANSFORMERS_MODELS_TO_{method}_{kind}_MODULES_MAPPING"
    node = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name)
    assert isinstance(node.value, ast.Dict)
    pairs = zip(node.value.keys, node.value.values, strict=True)
    return {key.value: ast.literal_eval(value) for key, value in pairs if isinstance(key, ast.Constant)}


@functools.cache
def adaption_prompt_models() -> tuple[str, ...]:
    """Model types for which PEFT has LLaMA-Adapter's attention."""
    file = _package_file("peft", "tuners/adaption_prompt/config.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.Assign) and "MODEL_CONFIG" in ast.unparse(n.targets[0]))
    assert isinstance(node.value, ast.Dict)
    return tuple(key.value for key in node.value.keys if isinstance(key, ast.Constant))


@functools.cache
def _mapping(file: str, name: str) -> dict[str, str]:
    """A table of transformers' auto classes: the pairs of `NAME = OrderedDict([(key, value), ...])`."""
    tree = ast.parse(_package_file("transformers", f"models/auto/{file}").read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name)
    assert isinstance(node.value, ast.Call)
    pairs = (pair.elts for pair in node.value.args[0].elts if isinstance(pair, ast.Tuple))
    return {key.value: value.value for key, value in pairs if isinstance(value, ast.Constant)}


def model_types() -> tuple[str, ...]:
    """The model types that have a configuration of their own and a causal language model."""
    configured = _mapping("auto_mappings.py", "CONFIG_MAPPING_NAMES")
    causal = _mapping("modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    return tuple(sorted(configured.keys() & causal))


@functools.cache
def model_config_fields(model_type: str) -> dict[str, Field]:
    """Fields of the configuration class of `model_type` (`llama`, `gemma3_text` ...); KeyError for an unknown type."""
    if model_type not in model_types():
        raise KeyError(model_type)
    special = _mapping("auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME")
    folder = special.get(model_type, model_type.replace("-", "_"))
    class_name = _mapping("auto_mappings.py", "CONFIG_MAPPING_NAMES")[model_type]
    files = sorted(_package_file("transformers", f"models/{folder}").glob("configuration_*.py"))
    path = next(file for file in files if f"class {class_name}(" in file.read_text(encoding="utf-8"))
    return _fields_in(path, class_name)


def rope_fields() -> dict[str, Field]:
    """Fields of transformers' `rope_parameters`, of all types of RoPE."""
    return _fields_in(_package_file("transformers", "modeling_rope_utils.py"), "RopeParameters")


@functools.cache
def rope_keys(rope_type: str) -> tuple[frozenset[str], frozenset[str]]:
    """The keys that transformers' validation of a `rope_type` requires, and those that it admits beside them."""
    tree = ast.parse(_package_file("transformers", "modeling_rope_utils.py").read_text(encoding="utf-8"))
    name = f"_validate_{rope_type}_rope_parameters"
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    sets = {ast.unparse(n.targets[0]): n.value for n in node.body if isinstance(n, ast.Assign)}
    found = (ast.literal_eval(sets[key]) if key in sets else () for key in ("required_keys", "optional_keys"))
    return tuple(map(frozenset, found))


@functools.cache
def accelerate_configs() -> dict[str, Path]:
    """Name -> file of the accelerate configurations that TRL ships (`fsdp2`, `zero3`, `multi_gpu` ...)."""
    return {path.stem: path for path in _package_file("trl", "accelerate_configs").glob("*.yaml")}


@functools.cache
def _reports() -> tuple[str, ...]:
    """What transformers' `report_to` may name."""
    tree = ast.parse(_package_file("transformers", "integrations/integration_utils.py").read_text(encoding="utf-8"))
    tables = (n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict))
    node = next(n for n in tables if ast.unparse(n.targets[0]) == "INTEGRATION_TO_CALLBACK")
    return tuple(key.value for key in node.value.keys if isinstance(key, ast.Constant))


def check_reports(value: object, where: str) -> list[str]:
    """Names in `report_to` that transformers does not know."""
    names, known = value if isinstance(value, list) else [value], _reports()
    unknown = [] if names in (["all"], ["none"]) else [name for name in names if name not in known]
    expected = f"expected all, none, or some of {', '.join(known)}."
    return [f"{where} = {name!r}: {expected}{nearest(name, ['all', 'none', *known])}" for name in unknown]


def missing_reports(value: object, where: str) -> str | None:
    """A package that `report_to` needs, where it is not installed on this machine."""
    for name in value if isinstance(value, list) else [value]:
        packages = () if name in ("all", "none") else _REPORT_PACKAGES.get(str(name), (str(name),))
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            return f"{where} = {name!r} needs the package {' or '.join(packages)}, which is not installed."
    return None


def arguments(cls: type) -> dict[str, Field]:
    """Argument name -> Field of an upstream class that is imported and has no configuration class."""
    found = inspect.signature(cls).parameters.values()
    shown = {p.name: inspect.formatannotation(p.annotation) for p in found if p.annotation is not p.empty}
    return {name: Field(text, *_types(ast.parse(text, mode="eval").body)) for name, text in shown.items()}


def check(section: dict, known: dict[str, Field], owner: str, where: str) -> list[str]:
    """What is wrong with a section handed to upstream, a message per key."""
    problems = []
    for key, value in section.items():
        field = known.get(key)
        choices = field and (field.choices or _WORDS.get(key))
        if field is None:
            problems.append(f"{where}.{key} = {value!r} is not a field of {owner}.{nearest(key, known)}")
        elif choices and isinstance(value, str) and value not in choices:
            expected = ", ".join(map(str, choices))
            problems.append(
                f"{where}.{key} = {value!r}: expected one of {expected}.{nearest(value, map(str, choices))}"
            )
        elif field.types is not None and not _fits(value, field.types):
            problems.append(f"{where}.{key} = {value!r} is {type(value).__name__}; {owner} expects {field.annotation}.")
        elif isinstance(value, float) and (math.isnan(value) or (key in _AT_LEAST and math.isinf(value))):
            problems.append(f"{where}.{key} = {value!r}: expected a finite number.")
        elif isinstance(value, int | float) and value < _AT_LEAST.get(key, value):
            problems.append(f"{where}.{key} = {value!r}: expected {_AT_LEAST[key]} or more.")
    return problems


def _fits(value: object, types: tuple[type, ...]) -> bool:
    # bool is an int to isinstance, but `learning_rate: true` is a mistake.
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types)
