"""Runs in SAELens's environment: trains one SAE after another with SAELens's own trainer, as asked on standard input.

Each line of input is JSON: rows (a file of `parts/rows.py`), out (a safetensors file to write), trainer, target_l0, lr,
steps, batch_rows, d_sae, seed, and `settings` for the trainer's configuration. Each line of output answers one.

Rows are fed as SAELens wants them, E‖x‖ about √D (its expected_average_only_in); what is written is in the rows' own
units with b_dec folded into the encoder: f = z·[z > θ], z = x·W_enc + b_enc, x̂ = f·W_dec + b_dec.
"""

import json
import sys
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def trainer_for(request: dict, D: int):
    """SAELens's trainer for a request; its batches are put in by the caller."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(request["seed"])
    common = {"d_in": D, "d_sae": request["d_sae"], **request["settings"]}
    if request["trainer"] == "saelens batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=request["target_l0"], **common))
    else:
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(target_l0=request["target_l0"], **common))
    rows, steps = request["batch_rows"], request["steps"]
    cfg = SAETrainerConfig(
        total_training_samples=steps * rows,
        train_batch_size_samples=rows,
        lr=request["lr"],
        lr_end=request["lr"] / 10,  # as its runner sets it; a constant schedule does not read it
        lr_warm_up_steps=request["lr_warmup_steps"],
        lr_decay_steps=request["lr_decay_steps"],
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg, sae, batches(request["rows"], steps, rows, D**0.5))


def batches(path: str, steps: int, rows: int, scale: float):
    """The file's training rows, in order and around again, times `scale`."""
    with safe_open(path, "pt") as file:
        train = file.get_tensor("train")
    per_epoch = len(train) // rows
    for step in range(steps):
        at = step % per_epoch * rows
        yield train[at : at + rows] * scale


def released(sae, scale: float) -> dict:
    """The tensors in the rows' own units, as SAELens saves them for inference."""
    state = {name: p.detach().clone() for name, p in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    b_enc = state["b_enc"] - state["b_dec"] @ state["W_enc"] if sae.cfg.apply_b_dec_to_input else state["b_enc"]
    return {
        "W_enc": state["W_enc"].contiguous(),
        "W_dec": state["W_dec"].contiguous(),
        "b_enc": b_enc / scale,
        "b_dec": state["b_dec"] / scale,
        "threshold": state["threshold"].clamp(min=0).float() / scale,
    }


def main() -> None:
    """Answers requests until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        with safe_open(request["rows"], "pt") as file:
            D = file.get_slice("train").get_shape()[1]
        trainer = trainer_for(request, D)
        start = time.perf_counter()
        sae = trainer.fit()
        seconds = time.perf_counter() - start
        save_file(released(sae, D**0.5), request["out"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
