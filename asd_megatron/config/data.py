"""Section `data`: problems (or given responses) and how they become prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import annotated_types as at
from pydantic import BeforeValidator, Field, ValidationError

from asd_megatron.config.base import Section, Text
from asd_megatron.errors import did_you_mean
from asd_megatron.gym.tasks import MOST_TEST_PROBLEMS

Fields = dict[str, str]
Rate = Annotated[float, at.Ge(0), at.Le(1)]
Length = Annotated[int, at.Ge(1)]


class TrainSet(Section):
    """One of several training sets."""

    path: Text
    weight: Annotated[float, at.Gt(0), at.Le(1e6)] = 1.0
    schema: Text | None = None  # type: ignore[assignment]
    fields: Fields = {}


def _train_sets(value: Any) -> Any:
    """A list of paths and mappings as training sets; other values are left to the type. Raises ValueError, in the
    words of a refused recipe."""
    if not isinstance(value, list | tuple):
        return value
    sets = []
    for number, given in enumerate(value, start=1):
        where = f"set {number} of the list"
        if not isinstance(given, Mapping | TrainSet | str):
            raise ValueError(f"{where} must be a path, or a mapping of {', '.join(TrainSet.model_fields)}")
        try:
            sets.append(TrainSet.model_validate({"path": given} if isinstance(given, str) else given))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                hint = did_you_mean(key, TrainSet.model_fields) or f"its keys are {', '.join(TrainSet.model_fields)}"
                raise ValueError(f"{where}: unknown key {key!r}: {hint}") from None
            raise ValueError(f"{where}: {key}: {first['msg']}, was given {first['input']!r:.80}") from None
    if not sets:
        raise ValueError("the list is empty: name a training set")
    return tuple(sets)


class FilterSection(Section):
    """Which problems of the training files are left out."""

    duplicates: Literal["error", "drop"] | None = None
    max_prompt_chars: Length | None = None
    max_answer_chars: Length | None = None
    long_prompts: Literal["error", "drop"] = "error"
    pass_rate_field: Text | None = None
    min_pass_rate: Rate = 0.0
    max_pass_rate: Rate = 1.0


class DataSection(Section):
    """Problem sets and prompts."""

    train: Annotated[Text | tuple[TrainSet, ...], BeforeValidator(_train_sets)] = Field(
        description=(
            "File or folder of problems (JSONL, JSON, Parquet, a folder of `datasets`: docs/data.md), `puzzle:train`,"
            " or `reasoning_gym:TASK` (docs/reasoning_gym.md); for the supervised stage one of given responses, or"
            " `puzzle:corpus`. A list mixes several files: `[{path: a.jsonl, weight: 2}, {path: b.parquet}]`, each with"
            " an optional `schema` and `fields`; of a step's problems each gives its part by `weight`."
        )
    )
    test: Text | None = Field(
        None,
        description=(
            "File or folder of held-out problems, as `data.train`, `puzzle:test`, or `reasoning_gym:TASK` (the name"
            " that `data.train` has, never its problems); null: no evaluation."
        ),
    )
    schema: Text | None = Field(  # type: ignore[assignment]
        None,
        description="Schema of `data.train`'s rows (docs/data.md lists them); null: the one that its first row fits.",
    )
    fields: Fields = Field(
        {},
        description=(
            "Fields of the rows of `data.train` that hold prompt, answer and so on, as dotted paths:"
            " `{prompt: question, answer: target.value}`. They replace what the schema reads; without `data.schema` the"
            " rows need no schema."
        ),
    )
    filter: FilterSection = Field(
        FilterSection(),
        description=(
            "Problems of the training files that are left out, counted in the start-up report. `duplicates`: `drop` or"
            " `error`, null: `error` for the canonical schema and `drop` for published ones; `max_prompt_chars`,"
            " `max_answer_chars`: longer ones; `long_prompts: drop`: those longer than `sampling.max_prompt_tokens`,"
            " which are refused otherwise; `pass_rate_field` with `min_pass_rate` and `max_pass_rate`: those too hard"
            " or too easy by a field of the rows (a dotted path)."
        ),
    )
    test_schema: Text | None = Field(None, description="`data.schema` of `data.test`.")
    test_fields: Fields = Field({}, description="`data.fields` of `data.test`.")
    reasoning_gym: dict[str, Any] = Field(
        {}, description="Parameters of the reasoning_gym task, such as `{min_terms: 2, max_terms: 4}`."
    )
    test_problems: int = Field(
        500,
        ge=1,
        le=MOST_TEST_PROBLEMS,
        description="How many problems of a reasoning_gym task are held out, whatever `data.test` is.",
    )
    format: Literal["chat", "raw"] = Field(
        "chat", description="`chat`: prompts go through the tokenizer's chat template; `raw`: through `raw_prompt`."
    )
    raw_prompt: Text = Field(
        "{prompt}",
        description=(
            "With `format: raw`, the prompt's text; `{prompt}` stands for the problem. The tokenizer's begin token is"
            " put before it unless it is there, its end token never after it."
        ),
    )
    system: str | None = Field(None, description="System turn put before chat prompts; null: none.")
    shuffle: bool = Field(
        True, description="Visit the training problems in a new order each epoch; false: the file's order."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description=(
            "Variables of the chat template, such as `{enable_thinking: false}`; `yes`, `no`, `on` and `off` are"
            " refused: write true or false."
        ),
    )

    @property
    def train_sets(self) -> tuple[TrainSet, ...]:
        """The training sets, one where `train` is a name."""
        if isinstance(self.train, str):
            return (TrainSet(path=self.train, schema=self.schema, fields=self.fields),)
        return self.train

    @property
    def train_name(self) -> str:
        """`train` in one line."""
        return " + ".join(given.path for given in self.train_sets)


_BOOLEANS = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}


def texts_for_booleans(values: Mapping[str, Any], key: str) -> Iterator[str]:
    """What is wrong with values such as `no`, which is text in YAML 1.2 and so true in a template; `key` names them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from texts_for_booleans(value, f"{key}.{name}")
        elif isinstance(value, str):
            meant = _BOOLEANS.get(value.lower(), value.lower())
            if meant in ("true", "false"):
                yield f"{key}: {name} is the text {value!r}, which a template takes for true: write {name}: {meant}"
