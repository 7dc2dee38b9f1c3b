"""Train models and write their checkpoints: python -m training.run MODEL..."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from runtimes.command import command, flags, parser, settings, table
from runtimes.errors import InputError, require
from training.checkpoint import Checkpoint, save_checkpoint
from training.spec import Config, Evaluation, ModelSpec, Recipe, all_specs, find_spec, override

POSITIVE = ("lr", "batch", "epochs")


@command
def main(argv: list[str] | None = None) -> int:
    """Train every named model; one table of metrics beside their baselines at the end."""
    arguments, more = _parser().parse_known_args(argv)
    specs = (
        list(all_specs().values()) if arguments.models == ["all"] else [find_spec(name) for name in arguments.models]
    )
    changes = {**settings(arguments.set), **flags(more)}
    if arguments.if_missing:
        specs = [spec for spec in specs if not (arguments.out / spec.name).is_dir()]
    runs = [(spec, *configure(spec, arguments.preset, changes)) for spec in specs]
    if arguments.resume and not any(_has_state(arguments.work, spec) for spec in specs):
        raise InputError(f"--resume: expected states of an earlier run in --work, found none in {arguments.work}")
    for spec, config, training in runs:
        recipe = spec.recipe()(config, training, arguments.data)
        for line in recipe.summary():
            print(f"{spec.name}: {line}", file=sys.stderr)
        folder = arguments.out / spec.name
        checkpoint, evaluation = train(spec, recipe, arguments.preset, folder, arguments.work, arguments.resume)
        print(f"\n{spec.name} -> {checkpoint.folder} (step {checkpoint.step}, {checkpoint.digest[:12]})")
        print(evaluation_table(evaluation))
    return 0


def configure(spec: ModelSpec, preset: str, changes: dict[str, str]) -> tuple[Config, Config]:
    """The preset's config and training settings with the user's changes; `InputError` for a setting neither has."""
    chosen = spec.preset(preset)
    known = chosen.config.keys() | chosen.training.keys()
    for name in changes.keys() - known:
        raise InputError(f"{spec.name} --set: expected a setting of {', '.join(sorted(known))}; found '{name}'")
    config = override(chosen.config, {name: text for name, text in changes.items() if name in chosen.config})
    training = override(chosen.training, {name: text for name, text in changes.items() if name in chosen.training})
    for name in POSITIVE:
        if training.get(name, 1) <= 0:
            raise InputError(f"--set {name}: expected a number above 0, found {training[name]}")
    if training.get("seed", 0) < 0:
        raise InputError(f"--set seed: expected 0 or more, found {training['seed']}")
    return config, training


def train(
    spec: ModelSpec, recipe: Recipe, preset: str, folder: Path, work: Path | None, resume: bool
) -> tuple[Checkpoint, Evaluation]:
    """The checkpoint of a newly trained model, and its evaluation.

    `work` keeps the Trainer's own states, from which `resume` goes on where there are any; without it they are
    thrown away.
    """
    transformers = require("transformers", extra="train")
    transformers.set_seed(recipe.training["seed"])
    module = spec.build(recipe.config)
    with tempfile.TemporaryDirectory(prefix="slipway-") as temporary:
        states = work / spec.name if work else Path(temporary)
        trainer = _trainer(recipe, module, states, keep=work is not None)
        trainer.train(resume_from_checkpoint=resume and _has_state(work, spec))
    module = module.cpu().eval()
    evaluation = recipe.evaluate(module)
    checkpoint = save_checkpoint(
        folder,
        spec,
        module,
        preset=preset,
        config=recipe.config,
        step=trainer.state.best_global_step if trainer.args.load_best_model_at_end else trainer.state.global_step,
        metrics=evaluation.metrics,
        probe=recipe.probe(),
    )
    return checkpoint, evaluation


def _has_state(work: Path | None, spec: ModelSpec) -> bool:
    return work is not None and any((work / spec.name).glob("checkpoint-*"))


def _trainer(recipe: Recipe, module: Any, states: Path, *, keep: bool) -> Any:
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    settings_ = recipe.training
    patience = settings_.get("patience", 0)
    saving = "epoch" if keep or patience else "no"
    arguments = TrainingArguments(
        output_dir=str(states),
        num_train_epochs=settings_["epochs"],
        per_device_train_batch_size=settings_["batch"],
        per_device_eval_batch_size=settings_["batch"],
        gradient_accumulation_steps=settings_.get("accumulate", 1),
        learning_rate=settings_["lr"],
        weight_decay=settings_.get("weight_decay", 0.0),
        lr_scheduler_type=settings_.get("scheduler", "cosine"),
        warmup_steps=settings_.get("warmup", 0.05),  # a number below 1 is a share of all steps
        max_grad_norm=settings_.get("clip", 1.0),
        bf16=settings_.get("precision", "fp32") == "bf16",
        fp16=settings_.get("precision", "fp32") == "fp16",
        gradient_checkpointing=settings_.get("gradient_checkpointing", False),
        seed=settings_["seed"],
        eval_strategy="epoch",
        save_strategy=saving,
        save_total_limit=2,
        load_best_model_at_end=bool(patience),
        metric_for_best_model="loss",
        prediction_loss_only=True,
        remove_unused_columns=False,  # batches are whole tensors, not columns of a dataset
        label_names=["labels"],
        logging_strategy="epoch",
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=require("torch", extra="train").cuda.is_available(),
        use_cpu=settings_.get("device", "auto") == "cpu",
    )
    train_data, valid_data = recipe.datasets(arguments.train_batch_size * arguments.world_size)
    callbacks: list[Any] = [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []

    class InOrder(Trainer):
        """The datasets order their own rows (a permutation by formula), so samplers only count."""

        def _get_train_sampler(self, *_: Any) -> Any:
            from torch.utils.data import SequentialSampler

            return SequentialSampler(train_data)

    return InOrder(
        model=recipe.trainee(module),
        args=arguments,
        train_dataset=train_data,
        eval_dataset=valid_data,
        data_collator=recipe.collate,
        callbacks=callbacks,
    )


def evaluation_table(evaluation: Evaluation) -> str:
    """Metrics in rows, the model and its baselines in columns."""
    names = list(evaluation.baselines)
    rows = [
        (metric, f"{value:.4f}", *(_cell(evaluation.baselines[name].get(metric)) for name in names))
        for metric, value in evaluation.metrics.items()
    ]
    return table(["metric", "model", *names], rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _parser() -> Any:
    result = parser(
        "training.run",
        __doc__.partition(":")[0] + ".",
        "policy_gru",
        "policy_mamba --data replays/ --out checkpoints --set lr=3e-4 --windows lazy",
    )
    result.add_argument("models", nargs="+", metavar="MODEL", help="model names, or 'all'")
    result.add_argument("--preset", default="tiny", help="size of the model (default: tiny)")
    result.add_argument("--data", type=Path, help="folder with the model's data (default: synthetic)")
    result.add_argument(
        "--out", type=Path, default=Path("checkpoints"), help="where checkpoints go (default: checkpoints)"
    )
    result.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; --NAME VALUE does too"
    )
    result.add_argument("--if-missing", action="store_true", help="leave models alone that have a checkpoint")
    result.add_argument("--work", type=Path, help="keep the Trainer's states here, so that --resume can go on")
    result.add_argument("--resume", action="store_true", help="go on from the newest state in --work")
    return result


if __name__ == "__main__":
    sys.exit(main())
