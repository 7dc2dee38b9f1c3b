"""The training loop: Hugging Face's Trainer over a recipe, alike for every model, on one device or several."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from runtimes.errors import InputError, require
from training.spec import Config, ModelSpec, Recipe

# What every model understands besides its own settings; a preset may have other defaults.
COMMON: Config = {
    "accumulate": 1,  # batches whose gradients are added up before a step
    "beta2": 0.999,  # of Adam
    "clip": 1.0,  # largest norm of the gradient
    "device": "auto",  # or cpu
    "gradient_checkpointing": False,
    "optimizer": "adamw_torch",  # or another of the Trainer's, such as adamw_bnb_8bit
    "patience": 0,  # epochs without a better validation loss before the end; 0 is never
    "precision": "fp32",  # or bf16 or fp16: mixed precision
    "scheduler": "cosine",  # or trapezoid (rises, stays, falls in straight lines), plateau, or one of the Trainer's
    "seed": 0,
    "warmup": 0.05,  # below 1 a share of all steps, else a number of steps
    "weight_decay": 0.0,
    "workers": 0,  # processes that make batches ahead of time
}
TRAPEZOID_FALL = 0.1  # of all steps
# Our names of what the Trainer calls otherwise; it makes no trapezoid, so `_trainer` does.
SCHEDULERS: dict[str, Config] = {
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.5, "patience": 1}},
    "trapezoid": {"lr_scheduler_type": "constant"},
}
CHOICES = {"device": ("auto", "cpu"), "precision": ("fp32", "bf16", "fp16")}
POSITIVE = ("lr", "batch", "epochs", "accumulate", "clip")
NOT_NEGATIVE = ("seed", "patience", "warmup", "weight_decay", "workers")


def check_training(training: Config) -> None:
    """`InputError` for a setting with which nothing can be trained."""
    for name in POSITIVE:
        if training.get(name, 1) <= 0:
            raise InputError(f"--set {name}: expected a number above 0, found {training[name]}")
    for name in NOT_NEGATIVE:
        if training[name] < 0:
            raise InputError(f"--set {name}: expected 0 or more, found {training[name]}")
    for name, allowed in CHOICES.items():
        if training[name] not in allowed:
            raise InputError(f"--set {name}: expected one of {', '.join(allowed)}; found '{training[name]}'")


def fit(spec: ModelSpec, recipe: Recipe, states: Path, *, keep: bool, resume: bool) -> Any:
    """The Trainer after training, with the module it trained, on the CPU and in eval mode, as `trained`.

    The Trainer's own states go to `states`: kept for a later `resume`, or removed at the end. Under torchrun every
    process trains; `is_world_process_zero()` says which one is to write the result.
    """
    transformers = require("transformers", extra="train")
    transformers.set_seed(recipe.training["seed"])
    module = spec.build(recipe.config)
    trainer = _trainer(recipe, module, states, keep)
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.accelerator.wait_for_everyone()  # a faster process must not remove what a slower one still reads
    finally:
        if not keep and trainer.is_world_process_zero():
            shutil.rmtree(states, ignore_errors=True)
    trainer.trained = module.cpu().eval()
    return trainer


def is_first_process() -> bool:
    """True but in the further processes that torchrun starts."""
    return int(os.environ.get("RANK", "0")) == 0


def trapezoid(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate at a step counted from 0, of `steps`; above 0 at the first and the last."""
    fall = max(1, round(TRAPEZOID_FALL * steps))
    return max(0.0, min(1.0, (step + 1) / (warmup + 1), (steps - step) / fall))


def _trainer(recipe: Recipe, module: Any, states: Path, keep: bool) -> Any:
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import SequentialSampler
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback

    class Tell(TrainerCallback):
        """What the Trainer logs goes to stderr; its own printer uses stdout, where the result goes."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if state.is_world_process_zero:
                told = {**(logs or {}), **(recipe.report() if "loss" in (logs or {}) else {})}
                print(" ".join(f"{name}={_short(value)}" for name, value in told.items()), file=sys.stderr)

    class InOrder(Trainer):
        """The datasets order their own rows (a permutation by formula), so samplers only count."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(train_data)

        def create_optimizer(self, model: Any = None) -> Any:
            groups = recipe.parameter_groups(module)
            if groups is None:
                return super().create_optimizer(model)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, None)
            self.optimizer = kind(groups, **options)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if recipe.training["scheduler"] != "trapezoid":
                return super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            share = partial(trapezoid, warmup=warmup, steps=num_training_steps)
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, share)  # type: ignore[arg-type]
            self._created_lr_scheduler = True
            return self.lr_scheduler

        def evaluate(self, *arguments: Any, **more: Any) -> Any:
            judged = recipe.judge(module)
            if judged is None:
                return super().evaluate(*arguments, **more)
            metrics = {f"eval_{name}": value for name, value in judged.items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    arguments = _arguments(recipe.training, states, keep)
    train_data, valid_data = recipe.datasets(arguments.train_batch_size * arguments.world_size)
    patience = recipe.training["patience"]
    callbacks: list[Any] = [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []
    trainer = InOrder(
        model=recipe.trainee(module),
        args=arguments,
        train_dataset=train_data,
        eval_dataset=valid_data,
        data_collator=recipe.collate,
        callbacks=[*callbacks, Tell()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _arguments(training: Config, states: Path, keep: bool) -> Any:
    from torch.accelerator import is_available
    from transformers import TrainingArguments

    try:
        return TrainingArguments(
            output_dir=str(states),
            num_train_epochs=training["epochs"],
            per_device_train_batch_size=training["batch"],
            per_device_eval_batch_size=training["batch"],
            gradient_accumulation_steps=training["accumulate"],
            learning_rate=training["lr"],
            optim=training["optimizer"],
            weight_decay=training["weight_decay"],
            adam_beta2=training["beta2"],
            **SCHEDULERS.get(training["scheduler"], {"lr_scheduler_type": training["scheduler"]}),
            warmup_steps=training["warmup"],
            max_grad_norm=training["clip"],
            bf16=training["precision"] == "bf16",
            fp16=training["precision"] == "fp16",
            gradient_checkpointing=training["gradient_checkpointing"],
            seed=training["seed"],
            eval_strategy="epoch",
            save_strategy="epoch" if keep or training["patience"] else "no",
            save_total_limit=2,
            load_best_model_at_end=bool(training["patience"]),
            metric_for_best_model="loss",
            prediction_loss_only=True,
            remove_unused_columns=False,  # batches are whole tensors, not columns of a dataset
            label_names=["labels"],
            logging_strategy="epoch",
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
            dataloader_num_workers=training["workers"],
            dataloader_pin_memory=is_available(),
            use_cpu=training["device"] == "cpu" or not is_available(),
        )
    except ValueError as error:  # a scheduler that does not exist, half precision without a device for it
        raise InputError(f"expected settings that the Trainer takes, found {' '.join(str(error).split())}") from error
