"""List models, their checkpoints and their published artifacts: slipway list"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtimes.artifact import Artifact
from runtimes.errors import SlipwayError, one_line
from runtimes.host.cli import command, json_argument, models_argument, parser, repository_argument, table, unknown_name
from runtimes.repository import artifacts_root, number_of, published
from training.checkpoint import Checkpoint, exists
from training.spec import all_specs

NOT_TRAINED, NOT_PUBLISHED = "not trained", "not published"
REMEDY = "list them: slipway list"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedArtifact:
    """The newest version of an artifact in the repository.

    served    whether it lies in the folder that Triton serves
    current   whether it was made from the checkpoint that is there now; None without a checkpoint
    verified  whether it was compared with the original and every check passed
    problem   why the manifest cannot be read, or empty
    """

    artifact: str
    version: int
    served: bool
    target: str = ""
    precision: str = ""
    verified: bool = False
    current: bool | None = None
    bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedModel:
    """A model with its checkpoint and its artifacts; `checkpoint_of` is another model for a part of it.

    checkpoint  digest, or empty: there is none, or `problem` states why it cannot be read
    """

    model: str
    checkpoint_of: str = ""
    checkpoint: str = ""
    preset: str = ""
    step: int | None = None
    problem: str = ""
    artifacts: list[PublishedArtifact] = field(default_factory=list)


@command
def main(argv: list[str] | None = None) -> int:
    """Print a line for each artifact, and for each model without one. Nothing is loaded into an engine."""
    arguments = _parser().parse_args(argv)
    models = inventory(arguments.checkpoints, arguments.repository)
    for name in arguments.models:
        if name not in models:
            raise unknown_name("model", name, models, REMEDY)
    chosen = [models[name] for name in arguments.models or sorted(models)]
    if arguments.json:
        print(json.dumps({"models": [asdict(model) for model in chosen]}))
    else:
        print(as_table(chosen))
    return 0


def inventory(checkpoints: Path, repository: Path) -> dict[str, ListedModel]:
    """Every model by name: those that are defined here, and those of which there is an artifact only."""
    models = {}
    for spec in all_specs().values():
        parent = "" if spec.checkpoint == spec.name else spec.checkpoint
        models[spec.name] = ListedModel(
            model=spec.name, checkpoint_of=parent, **_checkpoint(checkpoints / spec.checkpoint)
        )
    for folder in published(repository):
        model, artifact = _artifact(folder, repository, models)
        models.setdefault(model, ListedModel(model=model)).artifacts.append(artifact)
    return models


def as_table(models: Sequence[ListedModel]) -> str:
    """Models and artifacts in rows, and the meaning of the columns below."""
    header = ["model", "checkpoint", "target", "precision", "version", "served", "verified", "MB", "note"]
    rows: list[tuple[object, ...]] = []
    for model in models:
        head = (model.model, f"{model.preset} {model.checkpoint[:12]}" if model.checkpoint else NOT_TRAINED)
        note = "; ".join(filter(None, [f"part of {model.checkpoint_of}" * bool(model.checkpoint_of), model.problem]))
        for each in model.artifacts:
            own = each.problem or ("made from another checkpoint; export again" if each.current is False else note)
            yes = ["yes" if fact else "no" for fact in (each.served, each.verified)]
            rows.append((*head, each.target or each.artifact, each.precision, each.version, *yes, _mb(each), own))
        if not model.artifacts:
            rows.append((*head, NOT_PUBLISHED, *["-"] * 5, note))
    return table(header, rows)


def _checkpoint(folder: Path) -> dict[str, Any]:
    if not exists(folder):
        return {}
    try:
        found = Checkpoint.load(folder)
    except SlipwayError as error:
        return {"problem": one_line(error)}
    return {"checkpoint": found.digest, "preset": found.preset, "step": found.step}


def _artifact(folder: Path, repository: Path, models: dict[str, ListedModel]) -> tuple[str, PublishedArtifact]:
    """The model's name and the artifact; of an unreadable manifest only what its folder's name states."""
    name = folder.parent.name
    place: dict[str, Any] = {
        "artifact": name,
        "version": number_of(folder),
        "served": folder.is_relative_to(artifacts_root(repository, True)),
    }
    try:
        found = Artifact.load(folder)
    except SlipwayError as error:
        model = max((known for known in models if name.startswith(f"{known}_")), key=len, default=name)
        return model, PublishedArtifact(**place, problem=one_line(error))
    trained = models[found.model].checkpoint if found.model in models else ""
    return found.model, PublishedArtifact(
        **place,
        target=found.target,
        precision=found.precision,
        verified=found.verified,
        current=found.checkpoint == trained if trained else None,
        bytes=sum((folder / file).stat().st_size for file in found.files if (folder / file).is_file()),
    )


def _mb(artifact: PublishedArtifact) -> str:
    return f"{artifact.bytes / 1e6:.2f}" if artifact.bytes else "-"


def _parser() -> Any:
    result = parser("slipway.inventory", __doc__.partition(":")[0] + ".", "", "policy_gru strategy --json")
    models_argument(result, "models to list (default: all)")
    result.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), help="folder of checkpoints (default: %(default)s)"
    )
    repository_argument(result)
    json_argument(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
