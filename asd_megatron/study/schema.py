"""The study file: one typed, frozen, strict schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import annotated_types as at
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints, ValidationError

from asd_megatron.config.base import Section, Text, TextList, to_tuple, value_in_words
from asd_megatron.config.yaml_text import read_yaml
from asd_megatron.errors import UserError, did_you_mean

OWN_KEYS = ("run.seed", "run.name", "run.folder", "run.overwrite")  # the study sets them itself
DEFAULT_START = "default"


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or len(set(values)) != len(values):
        raise ValueError("expected at least one entry, and none twice")
    return values


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.=+-]*$")]
NameList = Annotated[tuple[Name, ...], BeforeValidator(to_tuple), AfterValidator(_distinct)]
NumberList = Annotated[tuple[Annotated[int, at.Ge(0)], ...], BeforeValidator(to_tuple), AfterValidator(_distinct)]
Overrides = dict[str, Any]


class Arm(Section):
    """One way to train: overrides of the recipe; its own choice of the study's seeds and starts, if it has one."""

    overrides: Overrides = Field({}, description="Recipe keys of this arm, as `section.key: value`.")
    seeds: NumberList | None = Field(None, description="Seeds of this arm; null: the study's.")
    starts: NameList | None = Field(None, description="Names of the starts of this arm; null: all.")


class Target(Section):
    """A level of a held-out metric: the report says after how many steps and seconds an arm is there."""

    metric: Text = Field("evaluation/accuracy", description="Name of the metric (docs/metrics.md).")
    at_least: float = Field(..., description="The level.")


class Table(Section):
    """What the report's tables show."""

    metrics: TextList = Field(("evaluation/accuracy",), description="Names of metrics (docs/metrics.md).")
    steps: NumberList | None = Field(None, description="Columns of the tables; null: every evaluation.")


class Study(Section):
    """Everything a study is."""

    name: Name = Field(..., description="The study's name; letters, digits and `_ . = + -`.")
    folder: Text = Field("runs/studies/{name}", description="The study's folder; `{name}` stands for `name`.")
    recipe: Text = Field(..., description="The recipe that all cells share.")
    overrides: Overrides = Field({}, description="Recipe keys of all cells, as `section.key: value`.")
    arms: dict[Name, Arm] = Field(..., min_length=1, description="Name -> arm.")
    starts: dict[Name, Overrides] = Field(
        {DEFAULT_START: {}}, min_length=1, description="Name -> overrides, such as `model.path`."
    )
    seeds: NumberList = Field(..., description="Every arm runs from every start with each of them.")
    baseline: Name | None = Field(None, description="The arm that the others are compared with; null: the first.")
    target: Target | None = Field(None, description="A level to reach; null: none.")
    table: Table = Field(Table(), description="What the report's tables show.")
    plot: TextList = Field(("evaluation/accuracy",), description="Names of the metrics to plot (docs/metrics.md).")
    parallel: int = Field(1, ge=1, description="Cells at a time; the cores are divided among them.")
    timeout: float = Field(86400.0, gt=0, description="Seconds after which a cell is ended and counts as failed.")

    @property
    def path(self) -> Path:
        """The study's folder with the name filled in."""
        return Path(self.folder.replace("{name}", self.name))

    @property
    def baseline_arm(self) -> str:
        return self.baseline if self.baseline is not None else next(iter(self.arms))

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        own = self.arms[arm].seeds
        return self.seeds if own is None else own

    def starts_of(self, arm: str) -> tuple[str, ...]:
        own = self.arms[arm].starts
        return tuple(self.starts) if own is None else own


def load_study(path: str | Path) -> Study:
    """Read and check a study file. Paths in it are relative to the current directory.

    Raises UserError for what `read_yaml` refuses, unknown keys (naming the nearest valid one), wrong types and names
    that do not exist. The recipe and its overrides are checked by `plan.plan_cells`.
    """
    values = read_yaml(Path(path), "study")
    if not isinstance(values, dict):
        raise UserError(f"study {path}: expected keys such as `recipe:` and `arms:`, see docs/studies.md")
    return make_study(values, f"study {path}")


def make_study(values: dict[str, Any], source: str = "study") -> Study:
    """A checked study from nested values. Raises UserError, naming `source`."""
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        found = list(dict.fromkeys(_line(dict(finding)) for finding in error.errors(include_url=False)))
        lines = f" {found[0]}" if len(found) == 1 else "".join(f"\n  {line}" for line in found)
        raise UserError(f"{source}:{lines}") from None
    _check_names(study, source)
    return study


def _check_names(study: Study, source: str) -> None:
    if study.baseline is not None and study.baseline not in study.arms:
        raise UserError(f"{source}: baseline: {no_such('arm', study.baseline, study.arms)}")
    for name, arm in study.arms.items():
        for start in arm.starts or ():
            if start not in study.starts:
                raise UserError(f"{source}: arms.{name}.starts: {no_such('start', start, study.starts)}")
    groups = {"overrides": study.overrides, **{f"arms.{name}.overrides": a.overrides for name, a in study.arms.items()}}
    groups |= {f"starts.{name}": overrides for name, overrides in study.starts.items()}
    for where, overrides in groups.items():
        for key in overrides:
            if key in OWN_KEYS:
                raise UserError(f"{source}: {where}: {key} is set by the study for every cell: leave it out")
            if "." not in key:
                raise UserError(f"{source}: {where}: {key!r} is no recipe key: write `section.key: value`")


def no_such(kind: str, name: str, names: Iterable[str]) -> str:
    """`no arm 'anti_sd': did you mean 'antisd'?`"""
    names = list(names)
    return f"no {kind} {name!r}: " + (did_you_mean(name, names) or f"there are {', '.join(names)}")


def _line(finding: dict[str, Any]) -> str:
    location = [str(part) for part in finding["loc"]]
    dotted, kind = ".".join(part for part in location if part != "[key]"), finding["type"]
    if kind == "extra_forbidden":
        fields = list(_model_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], fields, n=1, cutoff=0.0)
        return f"{dotted}: unknown key; the nearest valid one is {'.'.join([*location[:-1], *near])}"
    if kind == "missing":
        about = _model_at(location[:-1]).model_fields[location[-1]].description
        return f"{dotted}: missing; give it in the study file ({about})"
    if kind == "string_pattern_mismatch":
        return f"{dotted}: a name has letters, digits and `_ . = + -`, was given {value_in_words(finding['input'])}"
    return f"{dotted}: {finding['msg'].removeprefix('Value error, ')}; was given {value_in_words(finding['input'])}"


def _model_at(location: list[str]) -> type[BaseModel]:
    """The schema class whose key stands at `location`."""
    nested: dict[str, type[BaseModel]] = {"arms": Arm, "target": Target, "table": Table}
    return nested[location[0]] if location else Study
