"""Recipes: defaults, overrides, strictness, what a refusal says, saving and hashing."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_megatron.config import Recipe, SftRecipe, dump_recipe, foreign, load_recipe, make_recipe, recipe_hash
from asd_megatron.config.recipe import SCHEMAS
from asd_megatron.config.refusals import dotted_keys
from asd_megatron.config.yaml_text import parse_yaml, to_yaml
from asd_megatron.errors import UserError

MINIMAL: dict[str, Any] = {"model": {"path": "model"}, "data": {"train": "problems.jsonl"}}


def refusal(*overrides: str, **sections: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        make_recipe({**MINIMAL, **sections}, overrides)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_follow_the_paper() -> None:
    recipe = make_recipe(MINIMAL)
    assert recipe.algorithm.name == "antisd"
    assert recipe.algorithm.lambda_max == 0.5
    assert (recipe.algorithm.clip_low, recipe.algorithm.clip_high) == (0.2, 0.2)
    assert (recipe.gate.tau_down, recipe.gate.tau_up, recipe.gate_warmup_steps) == (0.93, 1.0, 5)
    assert (recipe.sampling.problems_per_step, recipe.sampling.rollouts_per_problem) == (32, 8)
    assert recipe.optimizer.learning_rate == 1e-6
    assert recipe.run.steps == 200


def test_both_forms_of_override_and_the_last_wins() -> None:
    recipe = make_recipe(
        MINIMAL,
        ["--run.steps", "3", "--optimizer.learning_rate=5e-5", "--run.steps=4", "--sampling.stop", '["\\n", "b"]'],
    )
    assert recipe.run.steps == 4
    assert recipe.optimizer.learning_rate == 5e-5
    assert recipe.sampling.stop == ("\n", "b")
    assert recipe.run.path == Path("runs/run")


def test_overrides_do_not_change_what_they_are_put_into() -> None:
    values = {"model": {"path": "m"}, "data": {"train": "t"}, "run": {"steps": 7}}
    make_recipe(values, ["--run.steps", "9"])
    assert values["run"] == {"steps": 7}


def test_a_number_takes_a_negative_sign_and_an_int_where_a_float_is_meant() -> None:
    assert make_recipe(MINIMAL, ["--privileged.success_threshold", "-1"]).privileged.success_threshold == -1.0


def test_text_overrides_are_literal() -> None:
    recipe = make_recipe(
        MINIMAL,
        ["--run.name", "3", "--data.format", "raw", "--data.raw_prompt", "Q: {prompt} # A:", "--data.test", "null"],
    )
    assert recipe.run.name == "3"
    assert recipe.data.raw_prompt == "Q: {prompt} # A:"
    assert recipe.data.test is None
    quoted = make_recipe(MINIMAL, ["--data.format", "raw", "--data.raw_prompt", '"{prompt}\\nAnswer:"'])
    assert quoted.data.raw_prompt == "{prompt}\nAnswer:"


def test_a_mapping_override() -> None:
    recipe = make_recipe(MINIMAL, ["--data.chat_template_kwargs", "{enable_thinking: false}"])
    assert recipe.data.chat_template_kwargs == {"enable_thinking": False}
    assert "is one value" in refusal("--data.chat_template_kwargs.enable_thinking", "false")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("--algorithm.lamda_max", "algorithm.lambda_max"),
        ("--algoritm.lambda_max", "algorithm.lambda_max"),
        ("--optimizer.lr_rate", "optimizer.learning_rate"),
        ("--algorithm.tau_down", "gate.tau_down"),
        ("--steps", "run.steps"),
        ("--evaluate.every", "evaluation.every"),
        ("--reward.timeout", "reward.timeout_seconds"),
        ("--rollout.verify", "rollout.verify_weights"),
    ],
)
def test_an_unknown_override_names_the_nearest_key(override: str, nearest: str) -> None:
    message = refusal(override, "1")
    assert "unknown key" in message and override[2:] in message
    assert message.endswith(nearest)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--lr", "optimizer.learning_rate"),
        ("--optimizer.lr", "optimizer.learning_rate"),
        ("--actor_rollout_ref.actor.optim.lr", "optimizer.learning_rate"),
        ("--tensor-model-parallel-size", "parallelism.tensor"),
        ("--trainer.n_gpus_per_node", "torchrun --nproc-per-node"),
        ("--algorithm.kl_coef", "algorithm.kl_coefficient"),
        ("--actor.use_kl_loss", "algorithm.kl_coefficient or algorithm.kl_estimator"),
        ("--ref_load", "the model of model.path"),
        ("--teacher_update_rate", "teacher.ema_rate"),
        ("--lora.r", "not supported"),
        ("--trainer.wandb", "not supported: metrics go to metrics.jsonl and TensorBoard"),
        ("--data.path", "the keys of data are train, test"),  # not model.path
        ("--frobnicate", "the sections are run, model"),
        ("--rope_scaling", "the sections are run, model"),  # not sampling
        ("--optimizer.lr_warmup", "optimizer.warmup_steps"),
        ("--max_length", "sampling.max_response_tokens"),
    ],
)
def test_a_key_of_another_framework_gets_ours_or_the_reason(override: str, expected: str) -> None:
    message = refusal(override, "1")
    assert expected in message and "nearest" not in message


def test_the_keys_named_for_other_frameworks_exist() -> None:
    named = {key for ours in foreign.COUNTERPARTS.values() for key in ours}
    assert named <= {*dotted_keys(Recipe), *Recipe.model_fields}
    assert not set(foreign.COUNTERPARTS) & set(foreign.WITHOUT)
    own = {key.partition(".")[2] for key in dotted_keys(Recipe)}
    assert not own & set(foreign.WITHOUT)


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "a: " + "9" * 5000, f"a: {2**64}", "a: !!float x", "a: !!int 0x1", "a: !!timestamp 2001-99-99", "\0"],
)
def test_yaml_that_no_recipe_can_mean_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="^recipe.*(YAML)"):
        parse_yaml(text, "recipe")


@pytest.mark.parametrize("text", ["[" * 102, "[" * 5000 + "]" * 5000, "- " * 5000])
def test_deep_nesting_is_refused_at_once(text: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match="nested too deeply"):
        parse_yaml(text, "recipe")
    assert time.process_time() - start < 5
    assert parse_yaml("[" * 100 + "]" * 100, "recipe")


def test_a_refusal_of_a_huge_value_is_short() -> None:
    doubling = ", ".join(f"&{b} [*{a}, *{a}, *{a}]" for a, b in pairwise("abcdefghij"))
    tree = parse_yaml(f"[&a [x], {doubling}]", "recipe")  # 3^9 leaves
    assert len(refusal(sampling={"stop": {"x": tree}})) < 10_000


def test_aliases_that_multiply_or_never_end_are_refused() -> None:
    """A copy of the recipe, as a run saves it, writes out what each alias stands for."""
    doubling = ", ".join(f"&{b} [*{a}, *{a}, *{a}]" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))
    with pytest.raises(UserError, match="recipe, line 1, column .* more than 100,000 values, aliases included"):
        parse_yaml(f"[&a [x], {doubling}]", "recipe")
    with pytest.raises(UserError, match="recipe, line 2, .* an alias inside of what it stands for"):
        parse_yaml("x:\n  &a {y: *a}", "recipe")
    assert parse_yaml("a: &a [1]\nb: *a", "recipe") == {"a": [1], "b": [1]}


def test_an_unknown_section_names_the_nearest() -> None:
    assert refusal(parallelsm={"tensor": 2}).endswith(
        "parallelsm: unknown section; the nearest valid one is parallelism"
    )


def test_a_recipe_of_the_other_program_is_named_as_such() -> None:
    assert "the section sft belongs to a recipe of `asd-megatron sft`: use that" in refusal(sft={"loss": "mean"})
    with pytest.raises(UserError, match="section rollout belongs to a recipe of `asd-megatron train`: use that"):
        make_recipe({"rollout": {"engine": "embedded"}}, kind="sft")


def test_a_section_as_an_override_lists_its_keys() -> None:
    assert "gate.tau_down" in refusal("--gate", "1")


def test_arguments_that_are_no_overrides() -> None:
    assert "unexpected argument 'steps=3'" in refusal("steps=3")
    assert "come right after the first one" in refusal("--run.steps", "3", "more.yaml")
    assert "--run.overwrite has no value" in refusal("--run.overwrite", "--run.steps", "3")
    assert "--run.overwrite has no value" in refusal("--run.overwrite")
    for flag in (["--dry_run"], ["--dryrun", "--run.steps", "3"], ["-dry-run"], ["--Dry_Run=true"], ["--dry-run", "1"]):
        assert "did you mean --dry-run" in refusal(*flag), flag
    assert "not supported: all weights are trained" in refusal("--lora")  # a key that is not there, value or none
    assert "the nearest valid one is run.steps" in refusal("--run.stepz", "--run.seed", "3")
    assert "--run.stepz" not in refusal("--run.steps", "[1")
    assert "not valid YAML" in refusal("--run.steps", "[1")


@pytest.mark.parametrize(
    ("key", "value", "expected", "given"),
    [
        ("run.steps", "many", "a whole number >= 1", "'many' (text)"),
        ("run.steps", "2.5", "a whole number >= 1", "2.5 (a number)"),
        ("run.steps", "0", "a whole number >= 1", "0 (a whole number)"),
        ("run.steps", "true", "a whole number >= 1", "true (true or false)"),
        ("run.steps", "null", "a whole number >= 1", "null"),
        ("run.overwrite", "1", "true or false", "1 (a whole number)"),
        ("run.overwrite", "yes", "true or false", "'yes' (text)"),
        ("algorithm.name", "ppo", "one of grpo, sd, antisd", "'ppo' (text)"),
        ("algorithm.pmi_clip", "0", "a number > 0 or null", "0 (a whole number)"),
        ("gate.h_warm", ".inf", "a number > 0 or null", "inf (a number)"),
        ("sampling.top_p", "1.5", "a number > 0 and <= 1", "1.5 (a number)"),
        ("sampling.stop", "x", "a list of texts", "'x' (text)"),
        ("sampling.stop_token_ids", "[-1]", "a list of whole numbers >= 0 or null", "-1 (a whole number)"),
        ("data.chat_template_kwargs", "3", "a mapping", "3 (a whole number)"),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_given(key: str, value: str, expected: str, given: str) -> None:
    message = refusal(f"--{key}", value)
    assert f"{key}: expected {expected}" in message
    assert f"was given {given}" in message


def test_text_in_a_file_must_be_text() -> None:
    assert 'was given 3 (a whole number) (quote it to make it text: "...")' in refusal(data={"train": 3})
    assert "examples/baselines/sdpo.yaml" in refusal(algorithm={"name": "SDPO"})
    assert "docs/options.md has the keys that make DAPO" in refusal(algorithm={"name": "DAPO"})
    assert "run.name" in refusal("--run.name", "../elsewhere")
    assert "reward.name: 'my function' is not of the form it takes" in refusal("--reward.name", "my function")


def test_all_findings_are_reported_at_once() -> None:
    message = refusal(model={}, data={"train": "t", "tset": "x"}, sampling=3)  # type: ignore[arg-type]
    assert "model.path: missing; give it in the recipe or as --model.path" in message
    assert "data.tset: unknown key; the nearest valid one is data.test" in message
    assert "sampling: expected a mapping of keys, was given 3" in message
    assert "model: this section is missing; it needs model.path" in str(pytest.raises(UserError, make_recipe, {}).value)


def test_reading_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {path: m}\ndata:\n  train: t\noptimizer:\n  learning_rate: 1e-6\nrun:\n")
    recipe = load_recipe(path, ["--run.seed", "5"])
    assert recipe.optimizer.learning_rate == 1e-6
    assert recipe.run.seed == 5
    assert isinstance(load_recipe(path, kind="sft"), SftRecipe)


def test_an_overriding_anchor_may_be_merged_again() -> None:
    """Also by a mapping that stands less deep, which PyYAML makes first."""
    text = "a: &a {x: 1, y: 2}\nb: {inner: &b {<<: *a, x: 3}}\nc: {<<: *b, y: 5}\n"
    assert parse_yaml(text, "t") == {"a": {"x": 1, "y": 2}, "b": {"inner": {"x": 3, "y": 2}}, "c": {"x": 3, "y": 5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: m\ndata: 3\n", "line 2, column 5: not valid YAML"),
        ("model:\n  path: a\n  path: b\n", "line 3, column 3: not valid YAML: 'path' is given twice (first in line 2)"),
        ("- 1\n", "expected sections such as `model:`, found list"),
        ("", "model: this section is missing"),
        (
            "model: {path: m}\ndata: {train: t}\nrun: {stepz: 3}\n",
            "run.stepz: unknown key; the nearest valid one is run.steps",
        ),
        (
            "model: {path: m}\ndata: {train: t}\nrun: {name: no}\nlogging: {progress: no}",
            "logging.progress: expected true",
        ),
        ("model: {path: m}\ndata: {train: t}\nrun: {1: 2}\n", "run: a key must be text, was given 1 (a whole number)"),
        ("model: {path: m}\ndata: {train: t}\nrun: {? : 2}\n", "run: a key must be text, was given null"),
        (
            "model: {path: m}\ndata: {train: t, chat_template_kwargs: {1: 2}}\n",
            "data.chat_template_kwargs: a key must be text, was given 1",
        ),
        ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)


def test_a_recipe_is_frozen() -> None:
    recipe = make_recipe(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.steps = 3  # type: ignore[misc]


def test_a_saved_recipe_has_every_key_and_reads_back_equal(tmp_path: Path) -> None:
    overrides = [
        "--sampling.stop", '["\\n", "1e-6", "no", "- x"]', "--gate.h_warm", "0.71",
        "--data.chat_template_kwargs", "{a: [1]}", "--run.name", "1e-6", "--optimizer.epsilon", "1e-20",
    ]  # fmt: skip
    recipe = make_recipe(MINIMAL, overrides)
    text = dump_recipe(recipe)
    saved = parse_yaml(text, "saved")
    assert [f"{section}.{key}" for section in saved for key in saved[section]] == dotted_keys(Recipe)
    again = load_recipe(write(tmp_path, text))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)
    assert len(recipe_hash(recipe)) == 64


def test_a_saved_supervised_recipe_reads_back_equal(tmp_path: Path) -> None:
    for extra in ([], ["--data.test", "t.jsonl", "--reward.name", "exact"]):
        recipe = make_recipe(MINIMAL, extra, kind="sft")
        assert load_recipe(write(tmp_path, dump_recipe(recipe)), kind="sft") == recipe


def test_the_hash_follows_the_values() -> None:
    plain = recipe_hash(make_recipe(MINIMAL))
    assert plain == recipe_hash(make_recipe(MINIMAL, ["--run.steps", "200"]))
    assert plain != recipe_hash(make_recipe(MINIMAL, ["--run.steps", "201"]))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_yaml(value: float) -> None:
    assert parse_yaml(to_yaml({"a": value}), "x") == {"a": value}


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12))
def test_texts_survive_yaml(value: str) -> None:
    assert parse_yaml(to_yaml({"a": [value]}), "x") == {"a": [value]}


@pytest.mark.parametrize(
    "text", ["1e-6", "1e5", "0.5", "-3", ".5", "5.", "true", "null", "1_000", "0x10", "1:30", "2020-01-01"]
)
def test_scalars_are_those_of_yaml_1_2(text: str) -> None:
    expected: dict[str, Any] = {"true": True, "null": None, "-3": -3}
    numbers = {"1e-6": 1e-6, "1e5": 1e5, "0.5": 0.5, ".5": 0.5, "5.": 5.0}
    assert parse_yaml(text, "x") == (expected | numbers).get(text, text)


def test_every_key_is_described() -> None:
    for schema in SCHEMAS.values():
        from asd_megatron.config.base import section_schema, type_in_words

        for dotted in dotted_keys(schema):
            section, _, key = dotted.partition(".")
            field = section_schema(schema, section).model_fields[key]
            assert field.description and field.description.endswith("."), dotted
            assert type_in_words(field), dotted


def test_further_files_change_the_recipe_and_overrides_come_last(tmp_path: Path) -> None:
    recipe = write(tmp_path, "model: {path: m, recompute: full}\ndata: {train: t}\nrun: {steps: 7}\n")
    layout, condition = tmp_path / "layout.yaml", tmp_path / "grpo.yml"
    layout.write_text("parallelism: {tensor: 2}\nrun: {steps: 8}\nmodel:\n")
    condition.write_text("algorithm: {name: grpo}\nrun: {steps: 9}\n")
    loaded = load_recipe(recipe, [str(layout), str(condition), "--parallelism.tensor", "4"])
    assert loaded.model.path == "m"
    assert loaded.model.recompute == "full"
    assert (loaded.run.steps, loaded.parallelism.tensor, loaded.algorithm.name) == (9, 4, "grpo")

    condition.write_text("algorithm: {nmae: grpo}\n")
    with pytest.raises(UserError, match=r"grpo\.yml.*nmae"):
        load_recipe(recipe, [str(condition)])
    with pytest.raises(UserError, match=str(tmp_path / "absent.yaml")):
        load_recipe(recipe, [str(tmp_path / "absent.yaml")])
