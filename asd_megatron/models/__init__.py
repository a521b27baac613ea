"""From a Hugging Face config to Megatron-Core model chunks, and back."""
