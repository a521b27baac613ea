"""Process groups from a layout, and the one place that lets Megatron-Core run without CUDA."""
