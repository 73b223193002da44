"""One process of two: trains what `CASES` (JSON) asks for, one case after the other, and leaves what came out.

usage: torchrun --nproc_per_node=2 two_processes.py FOLDER CASES

A case is {name: {"prompts": 13, "lora": false, "tied": false, "resume": null, "trouble": null, ...}}; what else it
has are settings of the trainer. Sharded cases come last: accelerate remembers that weights are sharded.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from training_cases import Prompts, small_llama, trainer, two_responses
from transformers import TrainerCallback

from clha.training import policy
from clha.training.metrics import metric_rows
from clha.training.processes import held_share


class KillSecondRank(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class SpoilSecondRank(TrainerCallback):
    """An infinite value in the half of a weight that the second process holds, after the last step."""

    def on_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 3 and args.process_index == 1:
            with torch.no_grad():
                next(model.parameters()).to_local()[-1, 0] = math.inf


class Look(TrainerCallback):
    """How much of the weights each process holds when training begins, and in which kind of parameters."""

    def on_train_begin(self, args, state, control, model=None, **_):
        self.held = held_share(model)
        self.kinds = sorted({f"{type(p).__name__} {p.dtype}" for p in model.parameters()})


def run(folder: Path, name: str, case: dict[str, Any]) -> None:
    own = folder / name
    prompts, resume, trouble = case.pop("prompts", 13), case.pop("resume", None), case.pop("trouble", None)
    model = small_llama(tied=case.pop("tied", False), lora=case.pop("lora", False))
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "max_steps": -1, "ddp_backend": "gloo"}
    data, held_out = (Prompts(size, seed, reference=True) for size, seed in ((prompts, 0), (7, 1)))
    made = trainer(own, model=model, data=data, evaluation=held_out, **(settings | case))
    look = Look()
    made.add_callback(look)
    if trouble == "infinite" and made.args.process_index == 1:
        made.model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    if trouble == "spoil":
        made.add_callback(SpoilSecondRank())
    if trouble == "kill":
        made.add_callback(KillSecondRank())
    given: list[torch.Tensor] = []
    computed = policy.response_logps

    def seen(*inputs: Any) -> torch.Tensor:
        given.append(computed(*inputs))
        return given[-1]

    policy.response_logps = seen
    try:
        before = made.evaluate()["eval_loss"]
        made.train(resume_from_checkpoint=resume and str(folder / resume))
        if trouble == "spoil":
            made.save_model(str(own / "saved"))
        rows = metric_rows(made.state.log_history)
        evaluated = made.evaluate() | {"before": before, "few": made.evaluate(two_responses(5))["eval_loss"]}
    finally:
        policy.response_logps = computed
    state = made.accelerator.get_state_dict(made.model_wrapped if made.is_fsdp_enabled else made.model)
    facts = {"sharded": made.is_fsdp_enabled, "held": look.held, "kinds": look.kinds}
    facts["logps"] = sorted({str(logps.dtype) for logps in given})
    facts["rounded"] = all(torch.equal(logps, logps.bfloat16().float()) for logps in given)
    if made.args.process_index == 0:
        names = [name for name, _ in made.accelerator.unwrap_model(made.model).named_parameters()]
        torch.save(torch.cat([state[name].flatten() for name in names]), own / "weights.pt")
        (own / "rows.json").write_text(json.dumps(rows))
        (own / "evaluated.json").write_text(json.dumps(evaluated))
        (own / "facts.json").write_text(json.dumps(facts))


def main(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    for name, case in cases.items():
        run(folder, name, case)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
