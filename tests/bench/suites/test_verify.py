"""Verification of saved adapters: what counts as a change, and which adapter a result is about."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from san_bench.run.folder import weights_sha256
from san_bench.suites.verify import VERIFIED, _changes, read_checks


def logits(*rows):
    return save({"logits": torch.tensor(rows)})


def answers(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_logits_change_a_prediction_where_their_largest_moves():
    before = {"predictions.safetensors": logits([1.0, 2.0], [3.0, 1.0], [0.0, 0.5])}
    after = {"predictions.safetensors": logits([1.0, 2.25], [0.5, 1.0], [0.0, 0.5])}
    assert _changes(before, before) == (0, 0.0)
    assert _changes(before, after) == (1, 2.5)


def test_answers_change_with_their_text_and_not_with_their_likelihood():
    one = {"index": 0, "predicted": "a", "log_likelihoods": {"a": -1.0, "b": -2.0}}
    other = {**one, "log_likelihoods": {"a": -1.5, "b": -2.0}}
    # a line separator inside an answer does not end its row
    assert _changes(
        {"x": answers(one), "y": answers({"t": "u\u2028v"})}, {"x": answers(other), "y": answers({"t": "w"})}
    ) == (
        1,
        0.5,
    )
    assert _changes({"y": answers({"t": "u"})}, {"y": answers({"t": "u"})}) == (0, None)


def test_checks_hold_for_the_adapter_that_was_verified(tmp_path):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"one")
    assert read_checks(tmp_path) is None
    facts = {"merge_changed_predictions": 2, "weights_sha256": weights_sha256(file.parent)}
    (tmp_path / VERIFIED).write_text(json.dumps(facts))
    assert read_checks(tmp_path) == {"merge_changed_predictions": 2}
    file.write_bytes(b"other")
    assert read_checks(tmp_path) is None
