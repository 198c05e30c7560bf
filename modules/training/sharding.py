"""Training over a base model that is larger than one device: FSDP2, as Lightning's ModelParallelStrategy runs it.

The base is frozen, so only its weights are sharded: every process keeps a part of each block and has the whole
block only while it runs. What is learned is whole in every process, and its gradients are averaged, so that a step
and a checkpoint are those of ``ddp``.

Blocks are gathered by all processes together. All must run the same passes: states of texts are not cached, and
evaluation, in which processes have different cases, is left to one process.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from torch.distributed.fsdp import fully_shard

from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.evaluation.requirements import require_unsharded
from corrigenda.modules.model import placement
from corrigenda.modules.model.lm import LanguageModel


class Sharded(ModelParallelStrategy):
    """``--trainer.strategy sharded``: one model, sharded over all processes of one or several machines.

    Checkpoints are the files that every other strategy writes; the base model is not in them.
    """

    # Lightning's would gather the whole base into a checkpoint, or write a folder with a part of each process.
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    optimizer_state = Strategy.optimizer_state
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        self._tensor_parallel_size = 1
        super().setup_environment()


StrategyRegistry.register("sharded", Sharded, description=Sharded.__doc__ or "")


class TrainedModule(EditingModule):
    """An EditingModule that learns something beside its frozen base model, which may be sharded."""

    replaces_layers: ClassVar[bool] = (
        False  # of the network, which must then be whole and in one place
    )

    @property
    def is_sharded(self) -> bool:
        return self.device_mesh is not None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        strategy, name = self.trainer.strategy, type(self).__name__
        if self.replaces_layers:
            require_unsharded(self.trainer, name)
            if placement.is_placed(self.lm.net):
                raise ValueError(f"{name} replaces layers of a model on one device: leave out "
                                 "--model.lm.device_map")  # fmt: skip
        if not isinstance(strategy, ModelParallelStrategy):
            return
        if not isinstance(strategy, Sharded):
            raise ValueError("ModelParallelStrategy would write the base model into every checkpoint: set "
                             "--trainer.strategy sharded, which is the same without it")  # fmt: skip
        if self.trainer.limit_val_batches != 0:
            raise ValueError(
                "processes that share a base model cannot evaluate different cases: set "
                "--trainer.limit_val_batches 0, and validate the checkpoint in one process, with "
                "--model.lm.device_map auto if the model is larger than one device"
            )

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.lm, self.device_mesh["data_parallel"])
            for name, tensor in self.state_dict().items():
                if not name.startswith("lm."):
                    torch.distributed.broadcast(tensor, src=0)

    def on_after_backward(self) -> None:
        """Averages the gradients over the processes, as ``ddp`` does by itself."""
        for parameter in self.parameters() if self.is_sharded else ():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.trainer.world_size


def shard(lm: LanguageModel, mesh: Any) -> None:  # noqa: ANN401
    """Shards a model's blocks, and its embeddings unless they share their weight, over the processes of a mesh.

    Raises ValueError for quantised weights, whose storage cannot be split.
    """
    lm.edits.weights_hash  # noqa: B018  while the weights are whole
    layers = range(lm.structure.num_layers)
    modules = [lm.net.get_submodule(lm.structure.block_name(layer)) for layer in layers]
    if not lm.structure.tied:
        modules += [lm.net.get_input_embeddings(), lm.net.get_output_embeddings()]
    for module in modules:
        if any(not parameter.is_floating_point() for parameter in module.parameters()):
            raise ValueError(
                "quantised weights cannot be sharded: leave out --model.lm.quantization, or use "
                "--trainer.strategy ddp"
            )
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
