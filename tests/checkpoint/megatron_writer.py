"""Checkpoints as Megatron-Core itself writes them, in this process: its own workers are forked, and may hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asd_megatron.checkpoint import lineage, optimizer_state
from asd_megatron.checkpoint.run_state import RunStateFile
from tests.checkpoint.trainer import RUN_STATE, Trainer


def save(folder: str | Path, state: dict[str, Any]) -> None:
    """`dist_checkpointing.save`. Collective."""
    import torch.distributed.checkpoint as torch_checkpoint
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    class InProcess(strategies.TorchDistSaveShardedStrategy):  # type: ignore[misc]
        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            flat = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)[0]
            planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            writer = torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1)
            torch_checkpoint.save(
                strategies.mcore_to_pyt_state_dict(flat, False), storage_writer=writer, planner=planner
            )
            save_config(CheckpointingConfig(self.backend, self.version), checkpoint_dir)

    dist_checkpointing.save(state, str(folder), sharded_strategy=InProcess("torch_dist", 1))


def save_training(folder: Path, trainer: Trainer, *, extra_states: bool = False) -> Path:
    """A training checkpoint with the optimizer gathered by Megatron (`fully_reshardable`), as earlier versions of this
    package wrote it. Without virtual stages: Megatron misplaces what follows a padded bucket. Collective."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    (chunk,) = trainer.port.parameters.chunks
    model = chunk.sharded_state_dict(metadata=dict(metadata))
    if not extra_states:
        model = {key: shard for key, shard in model.items() if "_extra_state" not in key}
    optimizer_state.fill(trainer.optimizer)
    optimizer = trainer.optimizer.sharded_state_dict({"model": model}, metadata=dict(metadata))
    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": model, "optimizer": optimizer, "scheduler": {"num_steps": trainer.scheduler.num_steps}}
    save(folder, state)
    content = RunStateFile(optimizer_state.is_distributed(trainer.optimizer), (), RUN_STATE, has_manifest=False)
    (folder / lineage.RUN_STATE).write_text(content.text(RUN_STATE["step"]))
    return folder
