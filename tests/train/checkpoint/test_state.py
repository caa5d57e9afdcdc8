"""A ``state.json`` with right hashes and wrong content is a DataError that names it."""

from __future__ import annotations

import json

import pytest

from open_mythos.errors import DataError
from open_mythos.train.build import build_model
from open_mythos.train.checkpoint.manifest import (
    MANIFEST_FILE,
    as_json,
    entry_of_file,
    manifest_text,
)
from open_mythos.train.trainer import Trainer

CHANGES = {
    "no progress": lambda s: s.pop("train"),
    "progress of another kind": lambda s: s.update(train=[1]),
    "a step too many": lambda s: s["train"].update(step=10**30),
    "half a step": lambda s: s["train"].update(step=1.5),
    "no tokens": lambda s: s["train"].update(tokens=None),
    "a word": lambda s: s["train"].update(skips="none"),
    "a negative count": lambda s: s["train"].update(rewinds=-1),
    "an unknown count": lambda s: s["train"].update(more=1),
    "a missing step": lambda s: s["train"].pop("step"),
    "no data": lambda s: s.pop("data"),
    "data of another kind": lambda s: s.update(data=3),
    "no watch": lambda s: s.pop("watch"),
    "watch of another kind": lambda s: s.update(watch="none"),
    "no scale": lambda s: s.pop("loss_scale"),
    "no depths": lambda s: s.pop("validated_depths"),
    "depths of another kind": lambda s: s.update(validated_depths={"low": "one", "high": 4}),
    "no configuration": lambda s: s.pop("config"),
    "a configuration of another kind": lambda s: s.update(config=7),
}


@pytest.fixture(scope="module")
def saved(make_run, make_loader, tmp_path_factory):
    run = make_run(train={"out_dir": str(tmp_path_factory.mktemp("run"))})
    return run, Trainer(build_model(run), make_loader(run), run).save()


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_refused(saved, make_loader, change):
    run, folder = saved
    original = (folder / "state.json").read_text()
    state = json.loads(original)
    CHANGES[change](state)
    try:
        (folder / "state.json").write_text(as_json(state))
        names = [path.name for path in folder.iterdir() if path.name != MANIFEST_FILE]
        text = manifest_text({name: entry_of_file(folder / name) for name in names})
        (folder / MANIFEST_FILE).write_text(text)
        trainer = Trainer(build_model(run), make_loader(run), run)
        with pytest.raises(DataError, match=r"state\.json") as found:
            trainer.resume()
        assert found.value.fix
    finally:
        (folder / "state.json").write_text(original)
