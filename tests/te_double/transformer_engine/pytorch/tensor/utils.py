from typing import Any


def replace_raw_data(tensor: Any, new_raw_data: Any) -> None:
    raise NotImplementedError


def cast_master_weights_to_fp8(
    model_weights: Any,
    master_weights: Any,
    start_offsets: Any,
    group: Any,
    fsdp_shard_model_weights: Any = None,
    manual_post_all_gather_processing: bool = False,
) -> None:
    raise NotImplementedError
