"""The training loop: Hugging Face's Trainer over a recipe, the same for every model, on one device or several."""

import os
import shutil
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from runtimes.errors import InputError, require
from runtimes.host.progress import Progress
from training.checkpoint import Checkpoint, save_checkpoint
from training.config import Config, Metrics
from training.recipe import Evaluation, Recipe
from training.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

TRAPEZOID_FALL = 0.1  # of all steps
# Our names of schedulers that the Trainer calls otherwise; it makes no trapezoid, so `_trainer` does.
SCHEDULERS: dict[str, Config] = {
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.5, "patience": 1}},
    "trapezoid": {"lr_scheduler_type": "constant"},
}
UNSHOWN = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def train(
    spec: ModelSpec, recipe: Recipe, preset: str, folder: Path, *, state_dir: Path | None = None, resume: bool = False
) -> tuple[Checkpoint, Evaluation] | None:
    """The checkpoint of a newly trained model and its evaluation; None in the further processes of torchrun.

    `state_dir` keeps the Trainer's own states, from which `resume` continues where there are any.
    """
    module, step = recipe.fit(), 0
    if module is None:
        states = state_dir / spec.name if state_dir else folder.with_name(f".{folder.name}.states")
        continued = resume and has_state(state_dir, spec)
        module, step = fit(spec, recipe, states, keep=state_dir is not None, resume=continued)
    if not is_first_process():
        return None
    evaluation = recipe.evaluate(module)
    checkpoint = save_checkpoint(
        folder,
        spec,
        module,
        preset=preset,
        config=recipe.config,
        training=recipe.training,
        step=step,
        metrics=evaluation.metrics,
        sample_inputs=recipe.sample_inputs(),
    )
    return checkpoint, evaluation


def has_state(state_dir: Path | None, spec: ModelSpec) -> bool:
    """Whether an earlier run left states of this model in `state_dir`."""
    return state_dir is not None and any((state_dir / spec.name).glob("checkpoint-*"))


def fit(spec: ModelSpec, recipe: Recipe, states: Path, *, keep: bool, resume: bool) -> tuple["nn.Module", int]:
    """The module that the Trainer trained, on the CPU and in eval mode, and the step of its weights.

    The Trainer's own states go to `states`: kept for a later `resume`, or removed at the end. Under torchrun every
    process trains; `is_first_process()` selects the one that writes the result.
    """
    transformers = require("transformers", extra="train")
    transformers.set_seed(recipe.training["seed"])
    module = spec.interface.build(recipe.config)
    with ExitStack() as stack:
        trainer = _trainer(spec.name, recipe, module, states, keep, stack)
        try:
            trainer.train(resume_from_checkpoint=resume)
            trainer.accelerator.wait_for_everyone()  # a faster process must not remove what a slower one still reads
        finally:
            if not keep and trainer.is_world_process_zero():
                shutil.rmtree(states, ignore_errors=True)
    state = trainer.state
    step = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    return module.cpu().eval(), step


def is_first_process() -> bool:
    """False in the further processes that torchrun starts."""
    return int(os.environ.get("RANK", "0")) == 0


def trapezoid(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate at a step counted from 0, of `steps`; above 0 at the first and the last."""
    fall = max(1, round(TRAPEZOID_FALL * steps))
    return max(0.0, min(1.0, (step + 1) / (warmup + 1), (steps - step) / fall))


class EpochLines:
    """One line of metrics per epoch on a terminal; elsewhere that of the last epoch, and progress every 30 seconds."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        self.name, self._stack = name, stack
        self._metrics: Metrics = {}
        self._bar: Progress | None = None

    def begin(self, steps: int) -> None:
        """Show the progress of so many steps until the stack closes."""
        self._bar = self._stack.enter_context(Progress(self.name, steps))

    def advance(self, done: int) -> None:
        """`done` of the steps are done."""
        if self._bar:
            self._bar.advance(done - self._bar.done)

    def add(self, metrics: Metrics) -> None:
        """Metrics of the current epoch; those of the validation complete its line."""
        self._metrics |= {name: value for name, value in metrics.items() if name not in UNSHOWN}
        if any(name.startswith("eval_") for name in metrics) and sys.stderr.isatty():
            self.write()

    def write(self) -> None:
        """Write the line of the epoch, if it has not been written."""
        if self._metrics:
            values = " ".join(f"{name}={_short(value)}" for name, value in self._metrics.items())
            tqdm.write(f"{self.name}: {values}", file=sys.stderr)
        self._metrics = {}


def _trainer(name: str, recipe: Recipe, module: Any, states: Path, keep: bool, stack: ExitStack) -> Any:
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import SequentialSampler
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer

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
            selection = recipe.selection_metric(module)
            if selection is None:
                return super().evaluate(*arguments, **more)
            metrics = {f"eval_{name}": value for name, value in selection.items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    arguments = _arguments(recipe.training, states, keep)
    train_data, valid_data = recipe.datasets(arguments.train_batch_size * arguments.world_size)
    patience = recipe.training["patience"]
    callbacks: list[Any] = [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []
    trainer = InOrder(
        model=recipe.module_with_loss(module),
        args=arguments,
        train_dataset=train_data,
        eval_dataset=valid_data,
        data_collator=recipe.collate,
        callbacks=[*callbacks, _log_callback(recipe, EpochLines(name, stack))],
    )
    trainer.remove_callback(PrinterCallback)  # it would write every line of metrics a second time, to stdout
    return trainer


def _log_callback(recipe: Recipe, lines: EpochLines) -> Any:
    """The Trainer's metrics and progress on stderr; stdout is for the result."""
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                lines.begin(state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            lines.advance(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.is_world_process_zero and "train_runtime" not in logs:
                lines.add({**logs, **(recipe.report() if "loss" in logs else {})})

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                lines.write()

    return Log()


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
            disable_tqdm=True,  # `EpochLines` shows the progress
            dataloader_num_workers=training["workers"],
            dataloader_pin_memory=is_available(),
            use_cpu=training["device"] == "cpu" or not is_available(),
        )
    except ValueError as error:  # a scheduler that does not exist, half precision without a device for it
        raise InputError(f"expected settings that the Trainer takes, found {' '.join(str(error).split())}") from error
