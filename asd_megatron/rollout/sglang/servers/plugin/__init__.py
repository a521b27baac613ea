"""On the import path of every server: a plugin of SGLang, found by its `dist-info`."""
