"""What a trainer needs to be one of several processes: sums over all of them, and weights that they share."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer

from clha.errors import UserError
from clha.training import policy


class ProcessesTrainer(Trainer):
    """A Trainer whose processes add up what they count, and share the weights (FSDP) on CPUs as on GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards over GPUs alone; here it would copy the weights to every process and not say so.
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UserError(
                "fsdp: there is one process, or accelerate does not shard over these devices; "
                "start several with torchrun, or train without fsdp"
            )
        if self.is_fsdp_enabled and self.args.bf16:
            # accelerate's policy would add gradients up in bfloat16, and round log-probabilities to it: sums of
            # hundreds of nats, of which eight bits are kept.
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        model: Any = self.model
        head = policy.causal_model(model).get_output_embeddings()
        if isinstance(head, FSDPModule):
            # Log-probabilities are computed from its weight: its own forward, which would gather that, never runs.
            model.register_forward_pre_hook(lambda *_: head.unshard())
        return prepared

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """bfloat16 where `bf16` asks for it: accelerate sees to it only in a model that training has prepared."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _summing(self, model: Any, last: bool) -> AbstractContextManager[None]:
        """Gradients are added up over the processes in the backward pass of the last micro-batch.

        Those of shards in each: there is no room for whole ones, in the steps either for which Trainer puts it off.
        """
        if self.is_fsdp_enabled:
            model.set_requires_gradient_sync(True)
        waits = not last and not self.is_fsdp_enabled
        return self.accelerator.no_sync(model) if waits else nullcontext()

    def _summed(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def _largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.args.world_size == 1:
            return value
        return int(self.accelerator.gather(torch.tensor([value], device=self.args.device)).max())

    def _from_all(self, values: list[str]) -> list[str]:
        """The lists of all processes, one after the other."""
        return values if self.args.world_size == 1 else gather_object(values)

    def _model_to_evaluate(self) -> Any:
        """The model as it is wrapped. Raises UserError where it is not on the devices yet."""
        model: Any = self.model_wrapped
        if self.is_fsdp_enabled and self.args.device.type != "cpu" and not isinstance(model, FSDPModule):
            raise UserError("evaluate: sharded weights get to the GPUs when training begins; set eval_on_start instead")
        return model


def held_share(model: torch.nn.Module) -> float:
    """The share of the model's weights that this process holds: 1 where they are not sharded.

    What a forward pass has gathered counts as held.
    """
    own = whole = 0
    for parameter in model.parameters():
        own += (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
        whole += parameter.numel()
    return own / whole
