"""Checkpoints: what is kept, what damage is seen, and what is loaded then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.checkpoint import CheckpointWriter, best_step, newest_intact, restore_parameters, steps_in
from train.errors import CheckpointError
from train.manifest import find_damage, read_manifest, write_manifest


def _tree(step: int):
    params = {"layers.query": jnp.arange(6.0).reshape(2, 3) + step, "norm.weight": jnp.full(5, 1.0 + step)}
    rest = {"optimizer": optax.adamw(1e-3).init(params), "step": jnp.int32(step)}
    return params, rest


def _abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _save(writer: CheckpointWriter, step: int, validation_loss: float | None = None) -> None:
    writer.save(step, *_tree(step), {"rows": step * 11}, validation_loss)


def _assert_restores(writer: CheckpointWriter, step: int) -> None:
    params, rest, data = writer.restore(step, *_abstract(_tree(step)))
    jax.tree.map(np.testing.assert_array_equal, (params, rest), _tree(step))
    assert jax.tree.structure((params, rest)) == jax.tree.structure(_tree(step))
    assert data == {"rows": step * 11}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    """A folder with whole checkpoints 3 and 7; copied by each test that damages it."""
    folder = tmp_path_factory.mktemp("whole")
    writer = CheckpointWriter(folder, 2, pytest.fail)
    _save(writer, 3, 0.5)
    _save(writer, 7, 0.75)
    writer.close()
    return folder


@pytest.fixture
def folder(two_checkpoints, tmp_path) -> Path:
    shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_round_trip_of_every_leaf(folder):
    writer = CheckpointWriter(folder, 2, pytest.fail)
    assert writer.newest == 7
    _assert_restores(writer, 7)
    writer.close()


def test_only_parameters(folder):
    params = restore_parameters(folder, 7, _abstract(_tree(7)[0]))
    jax.tree.map(np.testing.assert_array_equal, params, _tree(7)[0])


def test_keeps_the_newest_and_the_best(tmp_path):
    writer = CheckpointWriter(tmp_path, 2, pytest.fail)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0), (6, None)]:
        _save(writer, step, loss)
    writer.close()
    assert steps_in(tmp_path) == [2, 5, 6]
    assert best_step(tmp_path) == 2


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    writer = CheckpointWriter(tmp_path, 1, pytest.fail)
    for step, loss in [(1, 3.0), (2, 2.0), (3, float("nan")), (4, -float("inf")), (5, 2.5)]:
        _save(writer, step, loss)
    writer.close()
    assert steps_in(tmp_path) == [2, 5]
    assert best_step(tmp_path) == 2


def test_a_new_writer_still_knows_the_best(tmp_path):
    writer = CheckpointWriter(tmp_path, 1, pytest.fail)
    _save(writer, 1, 1.0)
    _save(writer, 2, 2.0)
    writer.close()
    writer = CheckpointWriter(tmp_path, 1, pytest.fail)
    _save(writer, 3, 3.0)
    writer.close()
    assert steps_in(tmp_path) == [1, 3]


def test_saving_a_step_twice_is_one_checkpoint(folder):
    writer = CheckpointWriter(folder, 2, pytest.fail)
    _save(writer, 7, 0.1)
    writer.close()
    assert read_manifest(folder / "7")["facts"]["validation_loss"] == 0.75


def test_saved_arrays_are_those_of_the_moment(tmp_path):
    """The buffers are donated to the next step while the save is still writing."""
    bump = jax.jit(lambda params: jax.tree.map(lambda a: a + 1, params), donate_argnums=0)
    writer = CheckpointWriter(tmp_path, 2, pytest.fail)
    params = {"large": jnp.zeros(1_000_003), "small": jnp.zeros(3)}
    writer.save(1, params, {"step": jnp.int32(1)}, {}, None)
    for _ in range(5):
        params = bump(params)
    jax.block_until_ready(params)
    writer.close()
    restored = restore_parameters(tmp_path, 1, _abstract(params))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in restored.values())


def _files() -> list[str]:
    return [
        "manifest.json",
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
        "data/metadata",
        "metrics/metrics",
        "params/_METADATA",
        "params/_sharding",
        "params/manifest.ocdbt",
        "params/d/*",
        "params/ocdbt.process_0/d/*",
        "params/ocdbt.process_0/manifest.ocdbt",
        "params/array_metadatas/process_0",
        "optimizer/_METADATA",
        "optimizer/d/*",
        "optimizer/ocdbt.process_0/d/*",
        "optimizer/manifest.ocdbt",
    ]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncate": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": Path.unlink,
    "flip": _flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", _files())
def test_a_damaged_newest_is_passed_over(folder, pattern, damage):
    path = max((folder / "7").glob(pattern), key=lambda p: p.stat().st_size)
    DAMAGES[damage](path)
    told: list[str] = []
    writer = CheckpointWriter(folder, 2, told.append)
    if pattern == "commit_success.txt" and damage != "delete":
        # its text is never read: it is there or not
        assert writer.newest == 7
    elif pattern == "_CHECKPOINT_METADATA" and damage == "flip" and writer.newest == 7:
        # a digit of a time, or a name that is not used: nothing that is loaded changes
        _assert_restores(writer, 7)
    else:
        assert writer.newest == 3
        assert len(told) == 1
        assert str(folder / "7") in told[0]
        assert "7.damaged" in told[0]
        _assert_restores(writer, 3)
    writer.close()


def test_every_kind_of_file_is_tried(two_checkpoints):
    tried = {path for pattern in _files() for path in (two_checkpoints / "7").glob(pattern)}
    left = {p.name for p in (two_checkpoints / "7").rglob("*") if p.is_file()} - {p.name for p in tried}
    assert left == set(), left


def test_a_whole_item_that_is_gone(folder):
    shutil.rmtree(folder / "7" / "optimizer")
    told: list[str] = []
    assert newest_intact(folder, told.append) == 3
    assert "is missing" in told[0]


def test_a_file_too_many_is_damage(folder):
    (folder / "7" / "params" / "stray").write_bytes(b"x")
    assert "stray does not belong" in (find_damage(folder / "7") or "")


def test_nothing_whole_means_nothing(folder):
    for step in (3, 7):
        (folder / str(step) / "manifest.json").unlink()
    assert newest_intact(folder, lambda _: None) is None
    writer = CheckpointWriter(folder, 2, lambda _: None)
    assert writer.newest is None
    writer.close()


def test_after_a_fallback_the_same_step_can_be_saved_again(folder):
    _flip(folder / "7" / "manifest.json")
    writer = CheckpointWriter(folder, 2, lambda _: None)
    _save(writer, 7, 0.75)
    writer.close()
    assert find_damage(folder / "7") is None
    assert steps_in(folder) == [3, 7]


def test_a_save_that_was_cut_short_leaves_no_checkpoint(folder):
    half = folder / "9.orbax-checkpoint-tmp"
    shutil.copytree(folder / "7", half)
    (half / "commit_success.txt").unlink()
    writer = CheckpointWriter(folder, 2, pytest.fail)
    assert writer.newest == 7
    _save(writer, 9, 0.3)
    writer.close()
    assert steps_in(folder) == [3, 7, 9] or steps_in(folder) == [7, 9]
    assert find_damage(folder / "9") is None


def test_another_architecture_is_named(folder):
    shapes = _abstract(_tree(7)[0])
    shapes["layers.query"] = jax.ShapeDtypeStruct((2, 5), jnp.float32, sharding=shapes["norm.weight"].sharding)
    with pytest.raises(CheckpointError, match=r"layers\.query: saved \[\[2, 3\].*the model has \[\[2, 5\]") as caught:
        restore_parameters(folder, 7, shapes)
    assert "\n" not in str(caught.value)
    writer = CheckpointWriter(folder, 2, pytest.fail)
    with pytest.raises(CheckpointError, match="another architecture"):
        writer.restore(7, shapes, _abstract(_tree(7)[1]))
    writer.close()


def test_a_failed_write_raises_and_leaves_the_old_checkpoint(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.checkpoint.write_manifest", full)
    writer = CheckpointWriter(folder, 2, pytest.fail)
    _save(writer, 9)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    assert newest_intact(folder, pytest.fail) == 7


def test_manifest_round_trip(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"hello")
    write_manifest(tmp_path, {"step": 5})
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest["facts"] == {"step": 5}
    assert manifest["files"] == {"a/b": [5, 0x3610A686]}


def test_no_manifest_is_read_from_rubbish(tmp_path):
    for content in (b"", b"\xff\xfe", b"{}", b"00000000\n{}", json.dumps({"files": {}}).encode()):
        (tmp_path / "manifest.json").write_bytes(content)
        assert read_manifest(tmp_path) is None
