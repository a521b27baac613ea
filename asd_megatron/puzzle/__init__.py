"""The built-in search puzzle: generator, tokenizer, warm-start corpus, model, verifier, report."""
