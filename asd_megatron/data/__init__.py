"""Problem files, prompts and privileged prompts as text and token ids, supervised examples."""
