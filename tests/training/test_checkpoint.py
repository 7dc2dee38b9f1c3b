"""A checkpoint holds what was trained, names what was frozen, and is refused when either is not what it was."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from runtimes.artifact import digests, sha256_json
from runtimes.errors import ArtifactError, InputError
from tests.conftest import write_untrained
from training import checkpoint as module
from training.checkpoint import MANIFEST, SAMPLE_INPUTS, WEIGHTS, Checkpoint, restore, save_checkpoint
from training.evaluate import main as evaluate
from training.spec import ModelSpec, all_specs, find_spec

SPECS = [spec for spec in all_specs().values() if spec.trained]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The file of a frozen base."""
    return write_base(tmp_path / "base.safetensors", seed=1)


def write_base(path: Path, seed: int, width: int = 4) -> Path:
    rng = np.random.default_rng(seed)
    save_file({"weight": rng.random((width, 3), np.float32), "bias": rng.random(width, np.float32)}, path)
    return path


@pytest.fixture
def saved(toy_model: ModelSpec, base: Path, tmp_path: Path) -> tuple[Checkpoint, nn.Module]:
    """A checkpoint of the toy model, and the module it was made of."""
    trained = write_untrained(toy_model, tmp_path / "toy", {"base": str(base)})
    return Checkpoint.load(tmp_path / "toy"), trained


def rewrite(checkpoint: Checkpoint, change: Callable[[dict[str, np.ndarray]], Any]) -> Checkpoint:
    """The checkpoint with other weights and a manifest that fits them, as a careful hand would make it."""
    tensors = load_file(checkpoint.folder / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint.folder / WEIGHTS)
    files = {name: digest for name, digest in digests(checkpoint.folder).items() if name != MANIFEST}
    edit(checkpoint, lambda data: data.update(files=files))
    return Checkpoint.load(checkpoint.folder)


def edit(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and sign it again."""
    data = json.loads((checkpoint.folder / MANIFEST).read_text())
    change(data)
    fields = {name: value for name, value in data.items() if name not in ("format", "sha256")}
    (checkpoint.folder / MANIFEST).write_text(json.dumps({**data, "sha256": sha256_json(fields)}))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_model_comes_back_bit_for_bit(spec: ModelSpec, tmp_path: Path) -> None:
    trained = write_untrained(spec, tmp_path / "model", {})
    restored = restore(Checkpoint.load(tmp_path / "model"), spec)
    assert not restored.training
    wanted = spec.interface.part(trained).state_dict()  # in `statements` the adapters are merged
    assert restored.state_dict().keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(restored.state_dict()[name], tensor), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_manifest_and_the_probe_of_every_model_come_back(spec: ModelSpec, checkpoints: Path) -> None:
    checkpoint = Checkpoint.load(checkpoints / spec.name)
    config = spec.preset("tiny")
    assert (checkpoint.model, checkpoint.preset, checkpoint.step) == (spec.name, "tiny", 7)
    assert (checkpoint.config, checkpoint.metrics) == (config, {"nats": 1.5})
    want = spec.parity.draw_inputs(config, np.random.default_rng(0), spec.interface.signature(config).sizes("opt"), {})
    assert checkpoint.sample_inputs().keys() == want.keys()
    for name, array in checkpoint.sample_inputs().items():
        np.testing.assert_array_equal(array, want[name])


def test_nothing_frozen_is_stored_and_nothing_trained_is_left_out(saved: tuple[Checkpoint, nn.Module]) -> None:
    checkpoint, _ = saved
    assert set(load_file(checkpoint.folder / WEIGHTS)) == {"base_scale", "gain", "head.weight", "head.bias"}
    assert set(checkpoint.frozen["base"]["tensors"]) == {"base.weight", "base.bias"}
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == [MANIFEST, SAMPLE_INPUTS, WEIGHTS]


def test_a_trained_part_comes_back_over_its_base(saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec) -> None:
    checkpoint, trained = saved
    restored = restore(checkpoint, toy_model)
    numbers = torch.randn(5, 3)
    assert torch.equal(restored(numbers)[0], trained(numbers)[0])


def test_another_base_of_the_same_shapes_is_refused(
    saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec, base: Path
) -> None:
    write_base(base, seed=2)
    with pytest.raises(ArtifactError, match=r"expected 'base' from .* 2 tensors differ, first 'base\.bias'"):
        restore(saved[0], toy_model)


def test_one_changed_number_in_the_base_is_noticed(
    saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec, base: Path
) -> None:
    tensors = load_file(base)
    tensors["weight"][3, 2] = np.nextafter(tensors["weight"][3, 2], np.float32(9))
    save_file(tensors, base)
    with pytest.raises(ArtifactError, match=r"1 tensors differ, first 'base\.weight'"):
        restore(saved[0], toy_model)


def test_a_checkpoint_that_does_not_name_its_base_is_refused(
    saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec
) -> None:
    edit(saved[0], lambda data: data.update(frozen={}))
    with pytest.raises(ArtifactError, match="expected 'base' from"):
        restore(Checkpoint.load(saved[0].folder), toy_model)


@pytest.mark.parametrize("name", [WEIGHTS, SAMPLE_INPUTS])
@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_changed_byte_is_noticed(checkpoints: Path, tmp_path: Path, name: str, place: int) -> None:
    write_untrained(find_spec("policy_gru"), tmp_path / "model", {})
    content = bytearray((tmp_path / "model" / name).read_bytes())
    content[place] ^= 1
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: expected sha256"):
        Checkpoint.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"previous_controller": false', '"previous_controller": true'),  # no shape depends on it
        ('"step": 7', '"step": 9'),
        ('"nats": 1.5', '"nats": 0.5'),
    ],
)
def test_a_changed_word_of_the_manifest_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    write_untrained(find_spec("policy_gru"), tmp_path, {})
    text = (tmp_path / MANIFEST).read_text()
    assert old in text
    (tmp_path / MANIFEST).write_text(text.replace(old, new))
    with pytest.raises(ArtifactError, match=r"checkpoint\.json: expected sha256"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, SAMPLE_INPUTS, MANIFEST])
def test_a_missing_file_is_noticed(tmp_path: Path, name: str) -> None:
    write_untrained(find_spec("policy_gru"), tmp_path, {})
    (tmp_path / name).unlink()
    with pytest.raises((ArtifactError, InputError), match=f"{name}: expected this file, found none"):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), r"1 parameters do not fit, first 'head\.bias': .*found none"),
        (lambda tensors: tensors.update(more=np.zeros(2)), "first 'more': expected none, found"),
        (
            lambda tensors: tensors.update({"head.weight": tensors["head.weight"].T.copy()}),
            "expected .2, 4., found .4, 2",
        ),
        (lambda tensors: tensors.update({"base.weight": np.zeros((4, 3), np.float32)}), r"first 'base\.weight'"),
        (lambda tensors: tensors.clear(), "4 parameters do not fit"),
    ],
    ids=["missing", "extra", "reshaped", "frozen", "empty"],
)
def test_weights_that_do_not_fit_are_refused(
    saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec, change: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        restore(rewrite(saved[0], change), toy_model)


def test_a_checkpoint_of_another_model_is_refused(checkpoints: Path) -> None:
    checkpoint = Checkpoint.load(checkpoints / "policy_gru")
    with pytest.raises(ArtifactError, match="expected a checkpoint of policy_lstm, found one of policy_gru"):
        restore(checkpoint, find_spec("policy_lstm"))


@pytest.mark.parametrize(
    ("folder", "status", "message"),
    [
        ("policy_gru", 1, "expected a checkpoint of policy_lstm, found one of policy_gru"),
        ("nothing", 2, "checkpoint.json: expected this file, found none"),
    ],
)
def test_the_command_line_says_so_in_one_line(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], folder: str, status: int, message: str
) -> None:
    assert evaluate(["policy_lstm", "--checkpoint", str(checkpoints / folder)]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


class Killed(BaseException):
    """What no handler catches."""


STEPS = ["mkdir", "save_file", "digests", "write_manifest", "first rename", "second rename", "last rmtree"]


def kill_in(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next saving end in this step, as if the process had been killed there."""
    renames = 0

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    def rename(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == (1 if step == "first rename" else 2):
            raise Killed
        return Path(real_rename(self, target))

    def rmtree(path: Path, **options: Any) -> None:
        if path.name.endswith(".old") and path.exists():
            raise Killed
        real_rmtree(path, **options)

    real_rename, real_rmtree = Path.rename, module.shutil.rmtree
    if step == "mkdir":
        monkeypatch.setattr(Path, "mkdir", die)
    elif "rename" in step:
        monkeypatch.setattr(Path, "rename", rename)
    elif step == "last rmtree":
        monkeypatch.setattr(module.shutil, "rmtree", rmtree)
    else:
        monkeypatch.setattr(module, step, die)


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_in_the_middle_of_saving_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    spec, folder = find_spec("policy_gru"), tmp_path / "model"
    old = write_untrained(spec, folder, {})
    with monkeypatch.context() as patch:
        kill_in(step, patch)
        with pytest.raises(Killed):
            save(spec, folder, factor=2.0)
    found = restore(Checkpoint.load(folder), spec).state_dict()["heads.main_x.0.weight"]
    weight = old.state_dict()["heads.main_x.0.weight"]
    assert torch.equal(found, weight) if step != "last rmtree" else torch.equal(found, 2 * weight)
    save(spec, folder, factor=4.0)
    found = restore(Checkpoint.load(folder), spec).state_dict()["heads.main_x.0.weight"]
    assert torch.equal(found, 4 * weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left lying about"


def save(spec: ModelSpec, folder: Path, factor: float) -> None:
    """Save what `write_untrained` saves with every parameter times `factor`."""
    torch.manual_seed(0)
    config = spec.preset("tiny")
    trained = spec.interface.build(config)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(factor)
    sample_inputs = {"frames": np.zeros((1, 2, 287), np.float32)}
    save_checkpoint(
        folder,
        spec,
        trained,
        preset="tiny",
        config=config,
        training={},
        step=1,
        metrics={},
        sample_inputs=sample_inputs,
    )


def test_the_first_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_in("first rename", monkeypatch)
    with pytest.raises(Killed):
        save(find_spec("policy_gru"), tmp_path / "model", factor=1.0)
    assert not (tmp_path / "model").exists()


def test_no_pickle_in_the_folder_is_opened(
    saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened")

    for name in ("pytorch_model.bin", "model.pt", "weights.pkl"):
        (saved[0].folder / name).write_bytes(pickle.dumps({"head.bias": 0}))
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, opened)
    assert isinstance(restore(Checkpoint.load(saved[0].folder), toy_model), nn.Module)


def test_a_transposed_parameter_is_stored_as_it_reads(
    saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec, tmp_path: Path
) -> None:
    checkpoint, trained = saved
    trained.head.weight = nn.Parameter(torch.arange(8.0).view(4, 2).T)
    assert not trained.head.weight.is_contiguous()
    folder = tmp_path / "transposed"
    again = save_checkpoint(
        folder,
        toy_model,
        trained,
        preset="tiny",
        config=checkpoint.config,
        training={},
        step=0,
        metrics={},
        sample_inputs={},
    )
    assert torch.equal(restore(again, toy_model).head.weight, trained.head.weight)


def test_a_bfloat16_parameter_comes_back_with_its_value(
    saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec, tmp_path: Path
) -> None:
    checkpoint, trained = saved
    trained.head.to(torch.bfloat16)
    folder = tmp_path / "bfloat16"
    again = save_checkpoint(
        folder,
        toy_model,
        trained,
        preset="tiny",
        config=checkpoint.config,
        training={},
        step=0,
        metrics={},
        sample_inputs={},
    )
    assert torch.equal(restore(again, toy_model).head.weight, trained.head.weight.float())


def test_the_digest_names_weights_config_and_base_but_not_metrics(
    saved: tuple[Checkpoint, nn.Module], toy_model: ModelSpec, base: Path, tmp_path: Path
) -> None:
    first = saved[0]
    write_untrained(toy_model, tmp_path / "again", {"base": str(base)})
    assert Checkpoint.load(tmp_path / "again").digest == first.digest
    edit(first, lambda data: data.update(metrics={"nats": 9.0}))
    assert Checkpoint.load(first.folder).digest == first.digest
    edit(first, lambda data: data["config"].update(width=5))
    assert Checkpoint.load(first.folder).digest != first.digest
    write_base(base, seed=2)
    write_untrained(toy_model, tmp_path / "again", {"base": str(base)})
    assert Checkpoint.load(tmp_path / "again").digest != first.digest
