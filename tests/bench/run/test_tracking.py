"""Trackers: what they leave below the folder of a run that was really trained."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.bench.small import built, short_recipe, small_scale, small_task

from san_bench.image.domain import Images
from san_bench.run import tracking as module
from san_bench.run.scales import scale_vectors
from san_bench.run.tracking import tracking
from san_bench.run.trainer import make_trainer
from san_bench.suites.engines import in_fresh_process
from san_peft.errors import SanError

EPOCHS, STEPS = 2, 8


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_scale():
        yield


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    """No variables and no login of whoever runs the tests."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_API_KEY", "TRACKIO_DIR", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def trained(folder, names, method="san"):
    """Trains a small model with trackers; returns the recipe, the model and the log."""
    recipe, task = short_recipe(method, folder), small_task()
    model = built(recipe, task)
    fields, callbacks = tracking(names, recipe, folder)
    trainer, _ = make_trainer(model, Images(recipe, task), folder)
    assert trainer.args.report_to == fields.pop("report_to")
    for name, value in fields.items():
        assert hasattr(trainer.args, name)
        setattr(trainer.args, name, value)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return recipe, model, [row for row in trainer.state.log_history if "loss" in row]


def test_tensorboard_has_curves_histograms_and_the_recipe(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is in the extra track")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, model, log = trained(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, STEPS + 1))
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in log])
    assert {"train/learning_rate", "train/grad_norm", "train/epoch"} <= set(events.Tags()["scalars"])
    scales = scale_vectors(model)
    assert set(events.Tags()["histograms"]) == {f"scale/{fqn}" for fqn in scales}
    for fqn, scale in scales.items():
        epochs = events.Histograms(f"scale/{fqn}")
        assert [event.step for event in epochs] == [STEPS // EPOCHS, STEPS]
        last = epochs[-1].histogram_value
        assert (last.num, last.min, last.max) == (len(scale), pytest.approx(scale.min()), pytest.approx(scale.max()))
    assert any((scale != 1).any() for scale in scales.values())
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert recipe.to_yaml() in text


def test_wandb_writes_offline_below_the_folder(tmp_path):
    wandb = pytest.importorskip("wandb", reason="W&B is in the extra track")
    folder = tmp_path / "run"
    recipe, model, log = trained(folder, ["wandb"])
    assert wandb.run is None  # finished, so that another run of this process gets one of its own
    (run,) = (folder / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    records = read_wandb(file)
    assert records[-1].WhichOneof("record_type") == "exit"  # all of it is there when the training ends
    config = {item.key or "/".join(item.nested_key): item.value_json for r in records for item in r.run.config.update}
    assert json.loads(config["recipe"]) == recipe.model_dump(mode="json")
    (project,) = {r.run.project for r in records if r.run.project}
    assert project == "san-peft"
    rows = [
        {"|".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.history.item
    ]
    losses = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {step: pytest.approx(row["loss"]) for step, row in enumerate(log, 1)}
    for fqn, scale in scale_vectors(model).items():
        found = {row["train/global_step"]: row for row in rows if f"scale/{fqn}|_type" in row}
        assert list(found) == [STEPS // EPOCHS, STEPS]
        assert {row[f"scale/{fqn}|_type"] for row in found.values()} == {"histogram"}
        assert sum(found[STEPS][f"scale/{fqn}|values"]) == len(scale)


def read_wandb(file):
    """The records of a run's file: LevelDB's log format, 7 bytes of header, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole, records = file.read_bytes(), 7, b"", []
    while place < len(data):
        if 32768 - place % 32768 < 7:  # too little for the head of a chunk: padding
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)  # after the checksum
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last of its chunks
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def test_a_login_to_wandb_is_used_without_calling_anyone(monkeypatch):
    pytest.importorskip("wandb", reason="W&B is in the extra track")
    assert module._mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert module._mode() == "online"


def track_by_trackio(folder):
    """A job of its own: trackio takes its folder on import, and keeps it."""
    os.environ.pop("TRACKIO_DIR", None)
    with small_scale():
        recipe, model, _ = trained(Path(folder), ["trackio"])
        with pytest.raises(SanError) as caught:
            tracking(["trackio"], recipe, Path(folder) / "other")
    return recipe.model_dump(mode="json"), {fqn: len(s) for fqn, s in scale_vectors(model).items()}, str(caught.value)


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is in the extra track")
def test_trackio_writes_below_the_folder(tmp_path):
    recipe, sizes, error = in_fresh_process(track_by_trackio, str(tmp_path))
    (file,) = (tmp_path / "trackio").glob("*.db")
    assert file.stem == "san-peft"
    with sqlite3.connect(file) as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
        configs = [json.loads(text) for (text,) in database.execute("select config from configs")]
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    assert configs[-1]["recipe"] == recipe
    for fqn, size in sizes.items():
        found = [row[f"scale/{fqn}"] for row in rows if f"scale/{fqn}" in row]
        assert [value["_type"] for value in found] == ["trackio.histogram"] * EPOCHS
        assert sum(found[-1]["values"]) == size
    assert f"{tmp_path / 'trackio'}" in error
    assert "set TRACKIO_DIR" in error


def test_a_method_without_scales_has_no_histograms(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is in the extra track")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path, ["tensorboard"], "linear")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["histograms"] == []
    assert len(events.Scalars("train/loss")) == STEPS


def test_a_host_has_the_scale_that_is_taken_out_of_it(tmp_path):
    recipe = short_recipe("hosts/san-lora", tmp_path, method__rank=2)
    model = built(recipe, small_task())
    scales = scale_vectors(model)
    assert scales
    assert all((scale == 1).all() for scale in scales.values())


def test_nothing_asked_for_is_nothing_reported(tmp_path):
    fields, callbacks = tracking([], short_recipe("san", tmp_path), tmp_path)
    assert fields["report_to"] == callbacks == []
    assert fields["run_name"].startswith("digits san seed 0 ")


def test_unknown_and_missing_trackers_come_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(module.TRACKERS, "wandp", module.TRACKERS["wandb"])
    with pytest.raises(SanError) as caught:
        tracking(["mlflow", "wandp"], short_recipe("san", Path(tmp_path)), tmp_path)
    assert str(caught.value).splitlines() == [
        "Unknown tracker mlflow. Choose from wandb, trackio, tensorboard, wandp.",
        'Not installed: wandp. pip install "san-peft[track]"',
    ]
