"""SGLang server processes: their options, starting them and watching over them."""
