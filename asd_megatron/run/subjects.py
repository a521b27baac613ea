"""The models that `asd-megatron evaluate` is given, each with the recipe that says how to evaluate it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from asd_megatron.checkpoint import lineage
from asd_megatron.checkpoint.huggingface import is_complete, read_config
from asd_megatron.checkpoint.locate import find
from asd_megatron.config import AnyRecipe, Kind, make_recipe
from asd_megatron.config.evaluation_checks import TEST
from asd_megatron.config.yaml_text import read_yaml
from asd_megatron.errors import UserError
from asd_megatron.observe.run_names import run_names
from asd_megatron.run.evaluation_request import Request
from asd_megatron.run.folder import CHECKPOINTS, EVALUATION, EXPORTS, RECIPE_FILE
from asd_megatron.run.sources import model_folder

OUT = Path("evaluation")
DEFAULT_PROMPT, DEFAULT_RESPONSE = 2048, 1024
"""Of a model folder without a recipe, in tokens, where its positions allow it."""


@dataclass(frozen=True)
class Subject:
    """One model to evaluate. `recipe`: its `run.folder` is where the results go, and `evaluation.sets` are the sets.
    `weights`: a Hugging Face folder, or a checkpoint for the model of `recipe.model.path`. `step`: training steps that
    they have seen; `label`: its name in tables; `run`: that of the run that it is of, None for other models."""

    label: str
    recipe: AnyRecipe
    kind: Literal["folder", "checkpoint"]
    weights: Path
    step: int = 0
    run: str | None = None

    @property
    def out(self) -> Path:
        return self.recipe.run.path


def subjects(request: Request) -> list[Subject]:
    """All of a request's, in its order. Raises UserError for what is no model, for sets that are not there, and for
    recipes of different layouts."""
    found = [subject for what in request.what for subject in _of(what, request)]
    found = _distinct(found, request)
    if (request.steps or request.every_step) and all(subject.run is None for subject in found):
        raise UserError("--step and --all choose among the checkpoints of a run: give the run's folder")
    layouts = {subject.recipe.parallelism.model_dump_json() for subject in found}
    if len(layouts) > 1:
        raise UserError(
            "the recipes have different parallelism sections, and one program evaluates all: give the same keys for all"
            " (--parallelism.tensor 1, for instance), or evaluate one after the other and compare with --plot"
        )
    return found


def run_of(path: Path) -> Path | None:
    """The run folder that `path` is, or that it is a checkpoint or an export of; None for anything else."""
    parent = path.resolve().parent
    folders = [path, *([parent.parent] if parent.name in (CHECKPOINTS, EXPORTS) else [])]
    return next((folder for folder in folders if (folder / RECIPE_FILE).is_file()), None)


def _of(what: str, request: Request) -> Iterator[Subject]:
    path = Path(what)
    if what.endswith((".yaml", ".yml")):
        recipe = _recipe(_values(path), request, what)
        out = request.out or OUT / recipe.run.name
        yield Subject(recipe.run.name, _into(recipe, out), "folder", model_folder(recipe.model.path))
        return
    run = run_of(path)
    if run is None:
        yield _model(path, request)
        return
    values = _values(run / RECIPE_FILE)
    for step, weights in _steps(run, path, request):
        yield _of_run(run, values, step, weights, request)


def _of_run(run: Path, values: Mapping[str, Any], step: int, weights: Path | None, request: Request) -> Subject:
    """weights: a checkpoint or an export of the run; None: the model that it started from."""
    kind: Literal["folder", "checkpoint"] = "checkpoint"
    if weights is None or is_complete(weights):
        kind = "folder"
        if weights is not None:
            values = {**values, "model": {**values.get("model", {}), "path": str(weights)}}
    recipe = _recipe(values, request, str(run / RECIPE_FILE))
    (name,) = run_names(run)
    out = (request.out or run / EVALUATION) / lineage.name(step)
    folder = model_folder(recipe.model.path) if weights is None else weights
    return Subject(f"{name} step {step}", _into(recipe, out), kind, folder, step, name)


def _steps(run: Path, path: Path, request: Request) -> list[tuple[int, Path | None]]:
    """(step, checkpoint or export) of a run that the request means; step 0 is the model that it started from."""
    if path.resolve() != run.resolve():
        return [(lineage.step_of(path.resolve().name), path)]
    there: dict[int, Path] = {}
    for folder in sorted((run / EXPORTS).glob("step_*")):
        if is_complete(folder):
            there[lineage.step_of(folder.name)] = folder
    there |= {lineage.step_of(folder.name): folder for folder in lineage.all_of(run / CHECKPOINTS)}
    if request.every_step and there:
        return [(step, there[step]) for step in sorted(there)]
    if request.steps:
        missing = [step for step in request.steps if step and step not in there]
        if missing:
            listed = ", ".join(map(str, sorted(there))) or "none"
            raise UserError(
                f"{run} has no checkpoint or export of step {missing[0]}: it has {listed} (and 0, its start)"
            )
        return [(step, there.get(step)) for step in request.steps]
    newest = lineage.latest(run / CHECKPOINTS)
    if newest is not None:
        return [(lineage.step_of(newest.name), newest)]
    if not there:
        raise UserError(f"{run} has no checkpoint and no export yet: --step 0 evaluates the model that it started from")
    return [(max(there), there[max(there)])]


def _model(path: Path, request: Request) -> Subject:
    """A Hugging Face folder, or a checkpoint that is of no run here."""
    found = find(path)
    if request.recipe is not None:
        values = _values(Path(request.recipe))
    elif found.kind == "checkpoint":
        raise UserError(
            f"{path} is a checkpoint outside of a run folder: give a recipe whose model.path has its configuration and"
            " tokenizer with --recipe FILE"
        )
    else:
        values = _without_recipe(found.folder, request)
    if found.kind == "huggingface":
        values = {**values, "model": {**(values.get("model") or {}), "path": str(found.folder)}}
    recipe = _recipe(values, request, f"{path}")
    name = found.folder.resolve().name
    out = request.out or OUT / name
    kind: Literal["folder", "checkpoint"] = "checkpoint" if found.kind == "checkpoint" else "folder"
    return Subject(name, _into(recipe, out), kind, found.folder, lineage.step_of(found.folder.name))


def _without_recipe(folder: Path, request: Request) -> dict[str, Any]:
    """The values of a recipe for a model folder alone."""
    data = [word.partition("=")[2] for word in request.sets if "=" in word]
    if not data:
        raise UserError(f"{folder} has no recipe that names problems: give --sets NAME=FILE, or --recipe FILE")
    response = dict(request.values).get("max_new_tokens") or DEFAULT_RESPONSE
    prompt = DEFAULT_PROMPT
    positions = read_config(folder).get("max_position_embeddings")
    if isinstance(positions, int):
        response = min(response, max(1, positions // 2)) if "max_new_tokens" not in dict(request.values) else response
        prompt = max(1, min(prompt, positions - response))
    return {
        "model": {"path": str(folder)},
        "data": {"train": data[0]},
        "reward": {"name": reward} if (reward := dict(request.values).get("reward")) else {},
        "sampling": {"max_prompt_tokens": prompt, "max_response_tokens": response},
    }


# ---------------------------------------------------------------- recipes


def _values(path: Path) -> dict[str, Any]:
    values = read_yaml(path, "recipe")
    if not isinstance(values, dict) or not all(isinstance(v, dict) or v is None for v in values.values()):
        raise UserError(f"recipe {path}: expected sections such as `model:` with keys")
    return {str(name): section for name, section in values.items()}


def _recipe(values: Mapping[str, Any], request: Request, source: str) -> AnyRecipe:
    """The recipe with the sets and settings of the request. Raises UserError."""
    kind: Kind = "sft" if request.sft or "sft" in values else "train"
    evaluation, data = dict(values.get("evaluation") or {}), dict(values.get("data") or {})
    own = {name: dict(given) for name, given in (evaluation.get("sets") or {}).items() if isinstance(given, dict)}
    read = {key: data.pop(f"test_{key}", None) for key in ("schema", "fields")}
    if data.get("test") is not None:
        own.setdefault(TEST, {"data": data["test"], **{key: value for key, value in read.items() if value}})
    sets = _chosen(request.sets, own, source)
    given = dict(request.values)
    for found in sets.values():
        found |= given
    data["test"] = None
    evaluation |= {"sets": sets, "every": 0, "at_start": True}
    changed: dict[str, Any] = {**values, "evaluation": evaluation, "data": data}
    rollout = dict(values.get("rollout") or {})
    if rollout.get("engine") == "replay":  # it has no responses of these problems
        changed["rollout"] = rollout | {"engine": "embedded", "replay_folder": None}
    if any(word.partition("=")[0] == "--data.test" for word in request.overrides):
        raise UserError("--data.test: here the problems are those of --sets NAME=FILE")
    return make_recipe(changed, request.overrides, kind, source)


def _chosen(words: Sequence[str], own: Mapping[str, dict[str, Any]], source: str) -> dict[str, dict[str, Any]]:
    """The sets by name: those of the command line, or all of the recipe."""
    if not words:
        if not own:
            raise UserError(f"{source} names no held-out problems: give --sets NAME=FILE")
        return {name: dict(given) for name, given in own.items()}
    chosen: dict[str, dict[str, Any]] = {}
    for word in words:
        name, equals, data = word.partition("=")
        if not equals and name not in own:
            raise UserError(
                f"--sets {word}: {source} has no set of that name ({', '.join(own) or 'it has none'}): write NAME=FILE"
            )
        if name in chosen:
            raise UserError(f"--sets: two sets are called {name}")
        chosen[name] = {**own.get(name, {}), "data": data} if equals else dict(own[name])
    return chosen


def _into(recipe: AnyRecipe, out: Path) -> AnyRecipe:
    """The recipe with `out` as its folder."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": str(out)})})


def _distinct(found: Sequence[Subject], request: Request) -> list[Subject]:
    """The subjects with labels and folders that are all different: several in one folder get folders inside it."""
    labels = [subject.label for subject in found]
    if len(set(labels)) < len(labels):
        paths = run_names(*(subject.weights for subject in found))
        labels = [
            f"{label} ({path})" if labels.count(label) > 1 else label for label, path in zip(labels, paths, strict=True)
        ]
    out = []
    folders = [str(subject.out) for subject in found]
    for subject, label in zip(found, labels, strict=True):
        folder = subject.out if request.out is None or len(found) > 1 else request.out
        if folders.count(str(folder)) > 1 or request.out is not None and len(found) > 1:
            base = request.out or folder
            folder = base / "".join(c if c.isalnum() or c in "_.+-" else "_" for c in label)
        out.append(replace(subject, label=label, recipe=_into(subject.recipe, folder)))
    return out
