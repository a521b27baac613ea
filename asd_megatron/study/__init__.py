"""Studies: many cells (arm x start x seed) of one recipe, run one after another, and what came of them."""
