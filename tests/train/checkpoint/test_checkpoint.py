"""Checkpoints: whole or not there, damage found before anything changes, never a silent start."""

import json
import logging
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_mythos import from_pretrained
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.files import sync_to_disk
from open_mythos.train import Trainer, build_model, find_checkpoint, verify_checkpoint
from open_mythos.train.checkpoint import manifest, write
from open_mythos.train.checkpoint.config_changes import MAY_CHANGE, reject_changes
from open_mythos.train.checkpoint.find import checkpoints
from open_mythos.train.checkpoint.restore import load_checkpoint
from open_mythos.train.checkpoint.snapshot import OPTIMIZER_FILE, stored_tensors

FILES = {
    "config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(make_run, make_loader, tmp_path_factory):
    """A run that has saved steps 2 and 4, trained once; never to be changed by a test."""
    folder = tmp_path_factory.mktemp("finished")
    run = make_run(train={"steps": 4, "save_every": 2, "out_dir": str(folder)})
    Trainer(build_model(run), make_loader(run), run).fit()
    return run, folder


@pytest.fixture
def trained(finished, make_loader, tmp_path):
    """A trainer at step 4, its run, and its folder of the checkpoints of steps 2 and 4."""
    run, folder = finished
    run = replace(run, train=replace(run.train, out_dir=str(tmp_path / "run")))
    shutil.copytree(folder, tmp_path / "run")
    trainer = Trainer(build_model(run), make_loader(run), run)
    trainer.resume()
    return trainer, run, tmp_path / "run" / "checkpoints"


def fresh(run, make_loader, **train):
    run = replace(run, train=replace(run.train, **train))
    return Trainer(build_model(run), make_loader(run), run)


def snapshot(trainer):
    state = stored_tensors(trainer.model, trainer.optimizer)[OPTIMIZER_FILE]
    tensors = trainer.model.state_dict() | state
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_holds_exactly_its_files_and_verifies(trained):
    _, _, folder = trained
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000002", "step_00000004"]
    for path in folder.iterdir():
        assert {p.name for p in path.iterdir()} == FILES
        verify_checkpoint(path)


def test_is_a_model_too(trained):
    trainer, _, folder = trained
    model = from_pretrained(folder.parent)
    assert_same(model.state_dict(), trainer.model.state_dict())


def test_state_says_how_it_was_made(trained):
    trainer, run, folder = trained
    state = json.loads((folder / "step_00000004" / "state.json").read_text())
    assert state["config"]["optim"] == run.to_dict()["optim"]
    assert state["config"].keys() == run.to_dict().keys()
    assert state["data"] == {"step": 4, "fingerprint": "data"}
    assert state["train"]["step"] == 4
    assert state["train"]["tokens"] == 4 * (8 * 6 - 3)
    depths = torch.stack(
        [trainer.stepper.plan.depths(s, range(8 * s, 8 * s + 8)) for s in range(4)]
    )
    assert state["train"]["min_depth"] == depths.min()
    assert state["train"]["max_depth"] == depths.max()


def test_round_trip_restores_everything(make_run, make_loader, tmp_path):
    run = make_run(train={"steps": 3, "out_dir": str(tmp_path)})
    trainer, other = (Trainer(build_model(run), make_loader(run), run) for _ in range(2))
    trainer.fit()
    other.resume()
    assert other.state == trainer.state
    assert other.loader.step == 3
    assert_same(snapshot(other), snapshot(trainer))


def test_keeps_the_newest(make_run, make_loader, tmp_path):
    run = make_run(train={"save_every": 1, "keep": 3, "out_dir": str(tmp_path)})
    Trainer(build_model(run), make_loader(run), run).fit()
    assert [p.name[-1] for p in checkpoints(tmp_path / "checkpoints")] == ["4", "5", "6"]


def test_a_save_that_does_not_read_back_costs_nothing(trained, monkeypatch):
    trainer, _, folder = trained

    def differs(path, text, pool):
        raise EnvironmentError_("the file does not read back as it was written")

    monkeypatch.setattr(write, "entry_of_text", differs)
    trainer.state.step = 5
    with pytest.raises(EnvironmentError_, match="read back"):
        trainer.save()
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_damage_is_found_named_and_passed_over(trained, make_loader, caplog, name, damage):
    _, run, folder = trained
    victim = folder / "step_00000004" / name
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        size = {"flip": len(content), "truncate": len(content) - 1, "empty": 0}[damage]
        victim.write_bytes(bytes(content) if damage == "flip" else victim.read_bytes()[:size])
    other = fresh(run, make_loader)
    before = snapshot(other)
    with pytest.raises(DataError) as caught:
        other.resume(strict=True)
    assert "step_00000004" in str(caught.value)
    if (damage, name) != ("flip", "manifest.json"):  # a digit of a hash names the hash's file
        assert caught.value.where == str(victim)
    assert_same(snapshot(other), before)
    with caplog.at_level(logging.WARNING):
        assert other.resume().step == 2
    assert "step_00000004" in caplog.text


def test_every_flipped_bit_is_found(trained):
    """A random bit of a random file, forty times."""
    _, _, folder = trained
    rng = random.Random(0)
    path = folder / "step_00000004"
    for _ in range(40):
        victim = path / rng.choice(sorted(FILES))
        content = victim.read_bytes()
        bit = rng.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(bytes(changed))
        with pytest.raises(DataError):
            verify_checkpoint(path)
        victim.write_bytes(content)
    verify_checkpoint(path)


def test_a_manifest_that_lost_its_last_byte_is_damage(trained):
    """It is still valid JSON, and no hash covers it."""
    _, _, folder = trained
    path = folder / "step_00000004" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"manifest\.json"):
        verify_checkpoint(path.parent)


def test_a_file_of_another_size_is_not_read(trained, monkeypatch):
    """A hole of many gigabytes takes no room on the disk, and minutes to hash."""
    _, _, folder = trained
    os.truncate(folder / "step_00000004" / "state.json", 1 << 40)
    hashed = []
    real = manifest.hash_blocks
    monkeypatch.setattr(manifest, "hash_blocks", lambda p: hashed.append(p.name) or real(p))
    with pytest.raises(DataError, match="1099511627776 bytes"):
        verify_checkpoint(folder / "step_00000004")
    assert "state.json" not in hashed


def test_a_file_too_many_is_damage(trained):
    _, _, folder = trained
    (folder / "step_00000004" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes\.txt"):
        verify_checkpoint(folder / "step_00000004")


def test_no_whole_checkpoint_is_an_error(trained, make_loader):
    _, run, folder = trained
    for path in folder.iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="no checkpoint to resume from"):
        fresh(run, make_loader).resume()
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="no checkpoint to resume from"):
        fresh(run, make_loader).resume()


def test_a_checkpoint_named_itself_has_no_stand_in(trained, make_loader):
    _, run, folder = trained
    assert fresh(run, make_loader).resume(folder / "step_00000002").step == 2
    assert fresh(run, make_loader).resume(folder.parent).step == 4
    (folder / "step_00000004" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        fresh(run, make_loader).resume(folder / "step_00000004")


def test_a_changed_config_is_refused_field_by_field(trained, make_loader):
    _, run, _ = trained
    changed = replace(run, optim=replace(run.optim, lr=0.5, beta1=0.5))
    trainer = Trainer(build_model(changed), make_loader(changed), changed)
    with pytest.raises(ConfigError) as caught:
        trainer.resume()
    assert "optim.lr: saved 0.001, now 0.5" in str(caught.value)
    assert "optim.beta1: saved 0.9, now 0.5" in str(caught.value)
    with pytest.raises(ConfigError, match=r"optim\.beta1"):
        trainer.resume(allow=["optim.lr"])
    assert trainer.resume(allow=["optim.lr", "optim.beta1"]).step == 4
    trainer.optimizer.zero_grad()
    trainer.train_step(4)
    assert {g["betas"][0] for g in trainer.optimizer.param_groups} == {0.5}


def test_fields_that_may_change(trained, make_loader):
    _, run, _ = trained
    trainer = fresh(run, make_loader, steps=6, log_every=3, eval_depths=[1], keep=1)
    assert trainer.resume().step == 4
    assert trainer.fit().step == 6


def test_may_change_names_real_fields(make_run):
    run = make_run().to_dict()
    for name in MAY_CHANGE:
        section, field = name.split(".")
        assert field in run[section]


def test_allow_must_name_a_field(make_run):
    run = make_run().to_dict()
    with pytest.raises(ConfigError, match=r"did you mean 'optim\.lr'"):
        reject_changes(run, run, ["optim.rl"])


def test_a_field_newer_than_the_checkpoint_had_its_default(make_run):
    saved, now = make_run().to_dict(), make_run().to_dict()
    del saved["train"]["clip"]
    reject_changes(saved, now)
    now["train"]["clip"] = 0.5
    with pytest.raises(ConfigError, match=r"train\.clip: saved 1\.0, now 0\.5"):
        reject_changes(saved, now)


def test_a_field_that_is_gone_is_a_difference(make_run):
    saved = make_run().to_dict()
    saved["train"]["momentum"] = 0.5
    with pytest.raises(ConfigError, match=r"train\.momentum: saved 0\.5, now 'absent'"):
        reject_changes(saved, make_run().to_dict())


def test_fields_that_hold_mappings_are_compared_whole(make_run):
    own = {"layer_overrides": {"0": {"window": 3}, "1": {"rope_theta": 0}}}
    run = make_run(model=own).to_dict()
    reject_changes(json.loads(json.dumps(run)), run)
    for other in ({}, {"layer_overrides": {"0": {"window": 3}}}):
        with pytest.raises(ConfigError, match=r"model\.layer_overrides"):
            reject_changes(run, make_run(model=other).to_dict())


def test_other_data_is_refused_before_anything_changes(trained, make_loader):
    _, run, _ = trained
    trainer = fresh(run, make_loader)
    trainer.loader.fingerprint = "other"
    before = snapshot(trainer)
    with pytest.raises(DataError, match="other data"):
        trainer.resume()
    assert_same(snapshot(trainer), before)


def test_another_model_is_refused(trained, make_run):
    trainer, _, folder = trained
    dense = build_model(make_run(architecture="dense"))
    with pytest.raises(DataError, match="another model"):
        load_checkpoint(folder / "step_00000004", dense, trainer.optimizer)


@pytest.mark.parametrize("fails", ["save_file", "entry_of_tensors", "_publish", "sync_to_disk"])
def test_a_failed_save_leaves_the_old_ones_and_no_ruin(trained, monkeypatch, fails):
    trainer, _, folder = trained

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    trainer.state.step = 5
    with monkeypatch.context() as patch:
        patch.setattr(write, fails, full)
        with pytest.raises(EnvironmentError_, match="No space left"):
            trainer.save()
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000002", "step_00000004"]
    verify_checkpoint(folder / "step_00000004")
    trainer.save()
    assert find_checkpoint(folder).name == "step_00000005"


def test_what_a_killed_save_left_behind_is_ignored_and_removed(trained):
    trainer, _, folder = trained
    shutil.copytree(folder / "step_00000004", folder / ".unfinished-step_00000005")
    os.unlink(folder / ".unfinished-step_00000005" / "manifest.json")
    assert find_checkpoint(folder).name == "step_00000004"
    trainer.state.step = 6
    trainer.save()
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000004", "step_00000006"]


def test_a_damaged_one_of_the_same_name_is_replaced(trained):
    trainer, _, folder = trained
    (folder / "step_00000004" / "state.json").write_text("{}")
    trainer.save()
    verify_checkpoint(folder / "step_00000004")
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000002", "step_00000004"]


def test_an_older_run_of_the_future_never_costs_the_new_checkpoint(trained, make_loader):
    _, run, folder = trained
    trainer = fresh(run, make_loader, keep=1, steps=3)
    trainer.resume(folder / "step_00000002")
    trainer.fit()
    assert [p.name for p in folder.iterdir()] == ["step_00000003"]


def test_tied_embeddings_survive(make_run, make_loader, tmp_path):
    run = make_run(model={"tie_embeddings": True}, train={"steps": 2, "out_dir": str(tmp_path)})
    first = Trainer(build_model(run), make_loader(run), run)
    first.fit()
    second = Trainer(build_model(run), make_loader(run), run)
    second.resume()
    assert_same(snapshot(second), snapshot(first))
    assert second.model.head.weight is second.model.embedding.weight


def test_moments_of_another_optimizer_are_refused(trained, make_run, make_loader):
    _, run, folder = trained
    other = replace(run, optim=replace(run.optim, name="muon"))
    with pytest.raises(DataError, match="state of another optimizer"):
        fresh(other, make_loader).resume(allow=["optim.name"])
    assert folder.is_dir()


def test_moments_of_another_shape_are_refused(trained):
    """Before anything is read, as those of another optimizer."""
    trainer, _, folder = trained
    path = folder / "step_00000004" / OPTIMIZER_FILE
    moments = load_file(path)
    name = next(name for name, each in moments.items() if each.dim() == 2)
    save_file(moments | {name: moments[name].mT.contiguous()[:1]}, path)
    with pytest.raises(DataError, match="state of another optimizer"):
        load_checkpoint(path.parent, trainer.model, trainer.optimizer)


def test_names_reach_the_disk_before_and_after_the_rename(trained, monkeypatch):
    """Without power, a name that was not synced is lost, with all its files."""
    trainer, _, folder = trained
    final, partial = folder / "step_00000005", folder / ".unfinished-step_00000005"
    done = []

    def noted(path):
        done.append((path, final.exists()))
        sync_to_disk(path)

    monkeypatch.setattr(write, "sync_to_disk", noted)
    trainer.state.step = 5
    trainer.save()
    assert sorted(done[:-2]) == sorted((partial / name, False) for name in FILES)
    assert done[-2:] == [(partial, False), (folder, True)]
