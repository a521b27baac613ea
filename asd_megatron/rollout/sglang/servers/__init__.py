"""SGLang server processes: their options, starting and restarting them."""
