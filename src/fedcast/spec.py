"""One spec describes one run: data, model, method, training, federation, evaluation.

A spec is TOML on disk and a frozen pydantic model in memory. Unknown keys are refused; no value can name Python code.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedcast.errors import SpecError, UnknownNameError
from fedcast.safe import UnsafeError, opened

_LARGEST = 1 << 18  # bytes of a spec
_SHOWN = 200
_IN_TOML = {"model_type": "Input should be a table", "tuple_type": "Input should be a list"}  # pydantic names Python's types
_KEY_PARTS = 16
_WORDS = re.compile(r"[\w-]++")
# Strings of TOML and its comments, also unfinished ones, each in one pass over its text.
_STRINGS = re.compile(
    r'''"""(?:[^"\\]++|\\(?:.|\Z)|"(?!""))*+(?:"{3,5}|\Z)|'''
    r"""'''(?:[^']++|'(?!''))*+(?:'{3,5}|\Z)|"""
    r"""\"(?:[^"\\\n]++|\\.)*+"?|'[^'\n]*+'?|#[^\n]*+""",
    re.DOTALL,
)
_LATER_KEYS = {
    "data": ("share",),
    "model": ("objective", "checkpoint"),
    "training": ("products", "kernels", "device", "compile", "schedule_over", "ranks"),
    "federation": ("weights",),
    "evaluation": ("horizons", "conflict"),
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSpec(_Section):
    """Where the series come from, how they are split by time and how they are spread over clients."""

    source: str = Field(
        "bundled",
        description="'bundled'; 'catalogue', 'ltsf' or a medical one (docs/medical.md), made from the folder FEDCAST_DATA names; "
        "or a folder: each file or folder a domain",
    )
    domains: tuple[str, ...] = Field((), description="domains to train on; empty: all that are not held out")
    held_out: tuple[str, ...] = Field((), description="domains never touched in training, forecast zero-shot at the end")
    time: str | None = Field(None, description="name of the time column; recognised when it is a known dialect")
    id: str | None = Field(None, description="name of the series column")
    target: str | None = Field(None, description="name of the target column")
    freq: str | None = Field(None, description="pandas frequency of every series; inferred when absent")
    validation: float = Field(0.1, gt=0, lt=0.5, description="share of each series, before the test part, for validation")
    test: float = Field(0.2, gt=0, lt=0.8, description="share of each series, at its end, for testing")
    share: float = Field(1.0, gt=0, le=1, description="share of each series' training part that is trained on: its latest")
    partition: Literal["domain", "series", "iid", "dirichlet", "long_tail"] = Field(
        "domain", description="how series are spread over clients"
    )
    clients: int = Field(8, ge=1, description="number of clients, for every partition but 'domain'")
    concentration: float = Field(0.5, gt=0, description="Dirichlet concentration over domains (partition 'dirichlet')")
    imbalance: float = Field(0.1, gt=0, le=1, description="smallest client's size over the largest's (partition 'long_tail')")


class ModelSpec(_Section):
    """The model's size and shape, and what it learns to do."""

    objective: Literal["forecast", "reconstruct"] = Field(
        "forecast", description="what the model learns: to 'forecast', or to 'reconstruct' hidden patches, from which it forecasts too"
    )
    checkpoint: str | None = Field(
        None, description="what is fine-tuned: a model or run folder, or a published checkpoint (folder, hub name); its size is its own"
    )
    size: Literal["nano", "micro", "tiny", "mini", "small", "base"] = Field(
        "nano", description="about 0.5M, 1M, 3M, 8M, 20M, 80M parameters"
    )
    context: int = Field(256, ge=16, description="longest context, in time steps")
    horizon: int = Field(64, ge=1, description="steps forecast in one pass; longer horizons are rolled")
    patch: int = Field(16, ge=1, description="time steps a patch")
    position: Literal["rope", "learned"] = Field("rope", description="position encoding")


class _Named(_Section):
    """A name and the options that stand beside it in TOML."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "options" not in value:
            field = cls.model_fields["name"]
            name = {} if "name" not in value and field.is_required() else {"name": value.get("name", field.default)}
            return {**name, "options": {k: v for k, v in value.items() if k != "name"}}
        return value


class MethodSpec(_Named):
    """The method's name and its hyper-parameters, which stand beside the name in TOML."""

    name: str = Field("fedtrl", description="see `fedcast methods`")
    options: dict[str, Any] = Field(default_factory=dict, description="hyper-parameters of the method, checked against it")


class TuningSpec(_Named):
    """Which weights train, and from where they start."""

    name: str = Field("full", description="see `fedcast tunings`")
    options: dict[str, Any] = Field(default_factory=dict, description="hyper-parameters of the tuning, checked against it")


class GuardSpec(_Named):
    """One guard around the method: its name and options."""

    name: str = Field(description="see `fedcast guards`")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the guard, checked against it")


class TrainingSpec(_Section):
    """What one local step is."""

    batch_size: int = Field(32, ge=1, description="windows a step")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW's second moment decay")
    clip_norm: float = Field(1.0, gt=0, description="largest gradient norm")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of all local steps with rising learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after the warm-up")
    schedule_over: Literal["run", "round"] = Field("run", description="whether warm-up and schedule span the run, or start anew each round")
    final_rate: float = Field(0.05, ge=0, le=1, description="learning rate at the end over its peak (not for 'constant')")
    moments: Literal["keep", "reset"] = Field("keep", description="whether a site keeps its AdamW moments between rounds")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute precision; master weights are float32; 'auto' takes the faster one of this machine"
    )
    products: Literal["auto", "default", "onednn"] = Field(
        "auto", description="library of float32 matrix products on the CPU; 'auto' takes the faster one of this machine"
    )
    kernels: Literal["auto", "torch", "native"] = Field(
        "auto", description="what computes a block in bfloat16 on the CPU; 'auto': native where `fedcast machine --build` compiled it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models train and are scored; 'auto': CUDA where there is one")
    ranks: int = Field(1, ge=1, description="processes that share a site's batches, one a device (docs/silo.md)")
    compile: bool = Field(False, description="compile the training step with torch.compile: needs a C++ compiler, and hardly pays on a CPU")


class FederationSpec(_Section):
    """The rounds and the fleet that carries them."""

    rounds: int = Field(20, ge=1, description="communication rounds")
    local_steps: int = Field(50, ge=0, description="gradient steps a site and round; 0: weights come back as they are")
    local_epochs: float | None = Field(None, gt=0, description="passes over a site's training points a round, instead of local_steps")
    participation: float = Field(1.0, gt=0, le=1, description="share of sites selected each round")
    weights: Literal["samples", "equal"] = Field(
        "samples", description="what a site weighs in means: its training points, or the same as any"
    )
    quorum: float = Field(0.5, gt=0, le=1, description="share of selected sites whose replies must be usable")
    deadline_s: float | None = Field(None, gt=0, description="seconds after which a round closes without the missing replies")
    evaluation_deadline_s: float | None = Field(
        None, gt=0, description="seconds after which scores are no longer waited for; deadline_s where absent"
    )
    fleet: Literal["threads", "processes", "flower"] = Field(
        "threads", description="worker threads in this process, worker processes, or the sites of a consortium (docs/consortium.md)"
    )
    workers: int = Field(2, ge=1, description="sites that work at the same time, one core each")

    @property
    def scoring_deadline_s(self) -> float | None:
        """Seconds after which scores are no longer waited for."""
        return self.deadline_s if self.evaluation_deadline_s is None else self.evaluation_deadline_s

    def selected(self, sites: int) -> int:
        """Return how many of ``sites`` take part in a round."""
        return _share(self.participation, sites)

    def needed(self, selected: int) -> int:
        """Return how many of the ``selected`` sites must answer usably."""
        return _share(self.quorum, selected)


class EvaluationSpec(_Section):
    """What is scored, how often, and beside which baselines."""

    every: int = Field(1, ge=1, description="rounds between validations")
    windows: int = Field(64, ge=1, description="test windows a domain, spread evenly over series and time")
    validation_windows: int = Field(64, ge=1, description="validation windows a domain")
    baselines: tuple[Literal["seasonal_naive", "auto_ets", "auto_theta"], ...] = Field(
        ("seasonal_naive",), description="forecasters scored on the same windows"
    )
    horizons: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="horizons that are scored, each on windows of its own; empty: model.horizon"
    )
    conflict: int = Field(0, ge=0, description="rounds between reports of how the domains' gradients conflict; 0: none")
    samples: int = Field(
        0,
        ge=0,
        description="forecasts a domain kept for the report; they leave the site together with their truth, so keep 0 for private data",
    )

    @field_validator("horizons")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a horizon stands twice")
        return value


class RunSpec(_Section):
    """One call = one spec -> one run folder."""

    name: str = Field("run", min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    method: MethodSpec = MethodSpec()
    tuning: TuningSpec = TuningSpec()
    training: TrainingSpec = TrainingSpec()
    federation: FederationSpec = FederationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    guards: tuple[GuardSpec, ...] = Field(
        (), description='steps around the method, in order, such as [{name = "clip"}]; see `fedcast guards`'
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as a TOML-ready dict; ``None`` values are left out, since TOML has none."""
        document: dict[str, Any] = _without_none(self.model_dump(mode="json"))
        for section in ("method", "tuning"):
            document[section] = {"name": document[section]["name"], **document[section]["options"]}
        document["guards"] = [{"name": guard["name"], **guard["options"]} for guard in document["guards"]]
        return document

    def to_toml(self) -> str:
        """Return the spec as TOML."""
        return tomli_w.dumps(self.to_dict())

    def fingerprint(self) -> str:
        """Return a SHA-256 over all that can change a trained byte: not name, fleet, workers or deadlines (rows say what came late)."""
        document = self.to_dict()
        del document["name"]
        for key in ("fleet", "workers", "deadline_s", "evaluation_deadline_s"):
            document["federation"].pop(key, None)
        # Keys that came later: at their default a run of an older version is still the same run.
        if document["tuning"] == {"name": "full"}:
            del document["tuning"]
        if not document["guards"]:
            del document["guards"]
        for section, keys in _LATER_KEYS.items():
            defaults = RunSpec.model_fields[section].default.model_dump(mode="json")
            for key in keys:
                if document[section].get(key) == defaults[key]:
                    document[section].pop(key, None)  # None was left out already
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _share(share: float, whole: int) -> int:
    # Rounded first: 0.28 * 25 is a little more than 7 in floating point.
    return max(1, ceil(round(share * whole, 9)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a TOML spec and apply ``key=value`` overrides.

    Parameters
    ----------
    path
        A TOML file.
    overrides
        Dotted assignments such as ``"federation.rounds=5"``; the value is read as TOML, or as a string where it is not TOML.

    Raises
    ------
    SpecError
        When the file is missing, not TOML, or a value is refused.
    UnknownNameError
        When a key is unknown.
    """
    file = Path(path)
    if not file.is_file():
        raise SpecError(f"no spec at {file}", hint="write one with `fedcast init SPEC.toml`, or check the path")
    try:
        with opened(file.resolve()) as (content, size):
            if size > _LARGEST:
                raise UnsafeError(f"{size} bytes, at most {_LARGEST} are read")
            document = _toml(content.read(_LARGEST).decode("utf-8"))
    except OSError as error:
        raise SpecError(f"{file} cannot be read: {error.strerror}", hint="check the file's permissions") from error
    except (ValueError, RecursionError) as error:
        # Beside its own error tomllib lets others pass: for numbers of thousands of digits, and for brackets within brackets.
        raise SpecError(f"{file} is not TOML: {_short(error)}", hint="mend that line; strings need quotes") from error
    return parse_spec(document, overrides, source=str(file))


def _toml(text: str) -> dict[str, Any]:
    """Read TOML; a key of n parts takes tomllib memory in the square of n, 60 GB for a file of 250 kB, so long ones are refused first."""
    bare = _WORDS.sub("k", _STRINGS.sub(lambda found: "" if found[0].startswith("#") else "k", text))
    if "k." * _KEY_PARTS in bare.replace(" ", "").replace("\t", ""):
        raise UnsafeError(f"a key has more than {_KEY_PARTS} parts")
    return tomllib.loads(text)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def parse_spec(document: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "spec") -> RunSpec:
    """Build a spec from a dict and overrides; see :func:`load_spec`."""
    try:
        merged = json.loads(json.dumps(document, default=str))
    except (ValueError, RecursionError) as error:
        raise SpecError(
            f"{source} cannot be read: {_short(error)}", hint="see `fedcast init --keys` for every key and what it takes"
        ) from error
    for assignment in overrides:
        _assign(merged, assignment)
    try:
        return RunSpec.model_validate(merged)
    except ValidationError as error:
        raise _spec_error(error, source) from error


def _assign(document: dict[str, Any], assignment: str) -> None:
    key, equals, raw = assignment.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"cannot read the override {assignment!r}", hint="write key=value, such as federation.rounds=5")
    try:
        value = _toml(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        value = raw
    *path, leaf = key.strip().split(".")
    node = document
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise SpecError(f"{part!r} in the override {assignment!r} is a value, not a section", hint="see `fedcast init --keys`")
    node[leaf] = value


def _spec_error(error: ValidationError, source: str) -> SpecError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        unknown = UnknownNameError.of("key", key, [".".join([*location[:-1], name]) for name in known])
        return UnknownNameError(f"{source}: {unknown.message}", hint=unknown.hint)
    hint = "see `fedcast init --keys` for every key and what it takes"
    if first["type"] == "missing":
        return SpecError(f"{source}: {key} is missing", hint=hint)
    return SpecError(f"{source}: {key} = {_short(repr(first['input']))} is refused: {_IN_TOML.get(first['type'], first['msg'])}", hint=hint)


def _known_keys(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = RunSpec
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)


def iter_keys() -> list[tuple[str, str, str, str]]:
    """Return every key of a spec as (dotted key, type, default, description)."""
    rows = []
    for name, field in RunSpec.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            for leaf, inner in field.annotation.model_fields.items():
                rows.append((f"{name}.{leaf}", _type_name(inner.annotation), _default(inner), inner.description or ""))
        else:
            rows.append((name, _type_name(field.annotation), _default(field), field.description or ""))
    return rows


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None")


def _default(field: Any) -> str:
    return "{}" if field.default_factory is not None else json.dumps(field.default, default=list)
