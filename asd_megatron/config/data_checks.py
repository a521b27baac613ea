"""Checks of the section `data`: training sets, schemas, filters."""

from __future__ import annotations

from collections.abc import Iterator

from asd_megatron.config.data import DataSection
from asd_megatron.config.recipe import AnyRecipe, SftRecipe
from asd_megatron.config.refusals import changed
from asd_megatron.data.jsonl import DataError
from asd_megatron.data.reading import ProblemReader
from asd_megatron.gym.tasks import task_of


def built_in(name: str) -> bool:
    """Whether a problem set is made by this package, not read from files."""
    return name.startswith("puzzle:") or task_of(name) is not None


def data_findings(recipe: AnyRecipe) -> Iterator[str]:
    """What cannot work in the section `data`, one finding each."""
    data = recipe.data
    if not isinstance(data.train, str):
        yield from _mixture(data)
    if isinstance(recipe, SftRecipe):
        if not isinstance(data.train, str):
            yield "data.train: the supervised stage reads one file or folder: join the files, or name their folder"
        for key in changed(data, "schema", "fields", "filter"):
            yield f"data.{key} is for sets of problems: the supervised stage reads its rows as docs/data.md says"
    elif isinstance(data.train, str) and built_in(data.train):
        for key in changed(data, "schema", "fields", "filter"):
            yield f"data.{key} is read only with files, and data.train is {data.train!r}: leave data.{key} out"
    for given in data.train_sets:
        yield from _schema("data", given.schema, given.fields)
    if data.test is None or built_in(data.test):
        for key in changed(data, "test_schema", "test_fields"):
            yield f"data.{key} is read only with a file as data.test: name one, or leave data.{key} out"
    yield from _schema("data.test", data.test_schema, data.test_fields)
    yield from _filter(data)


def _mixture(data: DataSection) -> Iterator[str]:
    for given in data.train_sets:
        if built_in(given.path):
            yield (
                f"data.train: {given.path!r} is no file, and a list mixes files alone (its problems have a reward of"
                " their own): name it alone, or leave it out"
            )
    for key in changed(data, "schema", "fields"):
        yield f"data.{key} is of one training set, and data.train lists several: give {key} to the set of the list"
    paths = [given.path for given in data.train_sets]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield f"data.train lists {path!r} twice: give it once, with the sum of the weights"


def _schema(key: str, schema: str | None, fields: dict[str, str]) -> Iterator[str]:
    try:
        ProblemReader("", schema, fields)
    except DataError as error:
        yield f"{key}: {error}"


def _filter(data: DataSection) -> Iterator[str]:
    given = data.filter
    if given.pass_rate_field is None:
        for key, value in changed(given, "min_pass_rate", "max_pass_rate").items():
            yield (
                f"data.filter.{key} {value:g} needs data.filter.pass_rate_field: the field of the rows with the"
                f" fraction of solved attempts; set it, or leave {key} out"
            )
    elif not changed(given, "min_pass_rate", "max_pass_rate"):
        yield (
            "data.filter.pass_rate_field leaves nothing out between 0 and 1: set data.filter.min_pass_rate or"
            " data.filter.max_pass_rate"
        )
    if given.min_pass_rate > given.max_pass_rate:
        yield (
            f"data.filter.min_pass_rate {given.min_pass_rate:g} is above data.filter.max_pass_rate"
            f" {given.max_pass_rate:g}: no problem is between them; lower it"
        )
