"""One process of two: trains on the prompts of `test_two_processes_take_the_same_steps_as_one`.

usage: torchrun --nproc_per_node=2 two_processes.py FOLDER none|fsdp PROMPTS [kill|infinite]
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
from training_cases import Prompts, trainer
from transformers import TrainerCallback

from clha.training.metrics import metric_rows


class KillSecondRank(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, sharding: str, prompts: int, trouble: str) -> None:
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "max_steps": -1, "ddp_backend": "gloo"}
    if sharding == "fsdp":
        settings |= {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
    made = trainer(folder / "two", data=Prompts(prompts), tokens_per_micro_batch=80, **settings)
    if trouble == "infinite" and made.args.process_index == 1:
        made.model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    if trouble == "kill":
        made.add_callback(KillSecondRank())
    made.train()
    evaluated = made.evaluate()
    state = made.accelerator.get_state_dict(made.model_wrapped if sharding == "fsdp" else made.model)
    if made.args.process_index == 0:
        names = [name for name, _ in made.accelerator.unwrap_model(made.model).named_parameters()]
        torch.save(torch.cat([state[name].flatten() for name in names]), folder / "weights.pt")
        (folder / "rows.json").write_text(json.dumps(metric_rows(made.state.log_history)))
        (folder / "evaluated.json").write_text(json.dumps(evaluated))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), "".join(sys.argv[4:]))
