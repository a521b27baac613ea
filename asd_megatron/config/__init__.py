"""Recipes: a typed, frozen, strict schema for each kind, with loading, checks and the reference page."""

from asd_megatron.config.checks import check_devices, check_model, check_recipe, check_world
from asd_megatron.config.loading import load_recipe, make_recipe
from asd_megatron.config.recipe import (
    AnyRecipe,
    Kind,
    Recipe,
    SftRecipe,
    dump_recipe,
    recipe_hash,
    values_hash,
)
from asd_megatron.config.reference import render_help, render_reference

__all__ = [
    "AnyRecipe",
    "Kind",
    "Recipe",
    "SftRecipe",
    "check_devices",
    "check_model",
    "check_recipe",
    "check_world",
    "dump_recipe",
    "load_recipe",
    "make_recipe",
    "recipe_hash",
    "render_help",
    "render_reference",
    "values_hash",
]
