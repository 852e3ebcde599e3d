"""`transformers` Trainer, with `peft` for LoRA, as a contender: as a user installs it, and at its best."""

from __future__ import annotations

import tempfile
from typing import Any, Literal

from contenders.train_pace import Pace, run
from contenders.train_sequences import load_sequences

Row = dict[str, Any]


def train(
    pace: Pace,
    *,
    folder: str,
    data: str,
    batch: int,
    best: bool = False,
    bf16: bool = False,
    compile: bool = False,
    collate: Literal["stack", "pad", "flatten"] = "stack",
    lora: int | None = None,
    device: str = "cpu",
) -> None:
    """Train the model in `folder`, or with `lora`, a rank, adapters on it.

    best: glibc keeps large buffers, as Craton has it, and nothing is logged; bf16, compile: of TrainingArguments.
    data: see `save_sequences`; read in its order, `batch` sequences a step, which `collate` stacks (all of one length),
    pads at the right, or lays one behind the other.
    """
    if best and device == "cpu":
        from craton.training.memory import keep_buffers

        keep_buffers()
    import torch
    from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainerCallback
    from transformers import TrainingArguments as Arguments

    class Callback(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace.step_done()

        def on_log(self, *_: Any, logs: Row, **__: Any) -> None:
            if "loss" in logs:
                pace.first_loss(logs["loss"])

    model = AutoModelForCausalLM.from_pretrained(folder)  # in the dtype of the checkpoint
    weights = str(model.dtype).removeprefix("torch.")
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    chosen: Row = {"bf16": bf16, "torch_compile": compile} if best else {}
    if best:
        chosen |= {"optim": "adamw_torch_fused", "logging_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as output:
        arguments = Arguments(
            output,
            per_device_train_batch_size=batch,
            max_steps=1_000_000,
            train_sampling_strategy="sequential",  # everybody reads the same batches
            logging_first_step=True,  # its loss shows that everybody does the same work
            save_strategy="no",
            use_cpu=device == "cpu",
            **chosen,
        )
        collators = {"stack": None, "pad": _pad, "flatten": DataCollatorWithFlattening()}
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[_row(s.ids, s.targets, torch) for s in load_sequences(data)],
            data_collator=collators[collate],
            callbacks=[Callback()],
        )
        words = [f"{weights} weights" if lora is not None else weights, *(["bf16 autocast"] if bf16 else [])]
        pace.begin(", ".join(words + ["compiled"] * compile), device)
        trainer.train()


def _row(ids: Any, targets: Any, torch: Any) -> Row:
    """A sequence as transformers wants it: labels stand on the tokens themselves and are shifted in the model."""
    labels = torch.full((len(ids),), -100)
    labels[1:] = torch.from_numpy(targets[:-1])
    return {"input_ids": torch.from_numpy(ids).long(), "labels": labels}


def _pad(rows: list[Row]) -> Row:
    """A batch as wide as its longest sequence."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


if __name__ == "__main__":
    run(train)
