"""Analyses of suites: numbers by hand, and which pictures a folder gives."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from tests.bench.small import short_recipe, small_scale
from tests.bench.suites import LAYERS, pattern, row, write_suite

from san_bench.report.figures.analysis import analyse, figures, write_pictures
from san_bench.report.groups import layer_kinds, pairs, read_groups
from san_bench.report.tables.estimate import wilson
from san_bench.run.scales import FILE, Scales
from san_bench.run.train import train
from san_peft.errors import SanError

FED = frozenset(layer for layer in LAYERS if not layer.endswith("2.fc2"))
TASKS = ("mini-vision/digits", "mini-vision/count", "mini-vision/texture")


def scales_of_row(one):
    """A pattern of the task for all methods but the linear probe; propagated by what is called san."""
    if one["method"] == "linear":
        return None
    return pattern(one["task"], one["seed"], propagated=FED if "san" in one["method"] else frozenset())


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A suite of three tasks with three seeds, with everything that runs leave behind."""
    rows = [
        row(task, method, seed, 0.5 + 0.1 * seed)
        for task in TASKS
        for method in ("linear", "ssf", "san")
        for seed in range(3)
    ]
    return write_suite(tmp_path_factory.mktemp("suite"), rows, lambda one: [2.0, 1.0, 0.5], scales_of_row)


@pytest.fixture
def little(tmp_path):
    """One run with everything that it leaves behind."""
    return write_suite(tmp_path / "little", [row("digits", "san", 0)], lambda one: [2.0, 1.0], scales_of_row)


def by(records, **wanted):
    found = [one for one in records if all(one[key] == value for key, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


# ---------------------------------------------------------------------------------------------- numbers


def test_accuracy_is_of_tasks_that_all_methods_have_with_the_spread_of_whole_seeds(tmp_path):
    rows = [
        row("f/a", "ssf", 0, 0.1),
        row("f/a", "ssf", 1, 0.3),
        row("f/b", "ssf", 0, 0.5),
        row("f/b", "ssf", 1, 0.9),
        row("f/b", "ssf", 2, 0.4),
        row("f/a", "san", 0, 0.6),
        row("f/b", "san", 0, 0.8),
        row("f/c", "san", 0, 1.0),
    ]
    accuracy = analyse(write_suite(tmp_path, rows))["accuracy"]
    ssf, san = by(accuracy, method="ssf"), by(accuracy, method="san")
    assert (ssf["n_tasks"], ssf["n_runs"], san["n_tasks"], san["n_runs"]) == (2, 5, 2, 2)
    assert ssf["mean"] == pytest.approx((0.2 + 0.6) / 2)
    assert ssf["seeds"] == pytest.approx([0.3, 0.6])  # seed 2 has one task alone
    assert ssf["sd"] == pytest.approx(0.3 / 2**0.5)
    assert (ssf["low"], ssf["high"]) == (pytest.approx(0.4 - ssf["sd"]), pytest.approx(0.4 + ssf["sd"]))
    assert san["mean"] == pytest.approx(0.7)
    assert (san["seeds"], san["sd"]) == (pytest.approx([0.7]), None)


def test_one_seed_has_the_interval_of_its_test_images(tmp_path):
    (san,) = analyse(write_suite(tmp_path / "one", [row("f/a", "san", 0, 0.6)]))["accuracy"]
    assert (san["low"], san["high"]) == pytest.approx(wilson(60, 100))
    rows = [row("f/a", "san", 0, 0.6), row("f/b", "san", 0, 0.9)]
    (san,) = analyse(write_suite(tmp_path / "two", rows))["accuracy"]
    lows, highs = zip(wilson(60, 100), wilson(90, 100), strict=True)
    assert san["low"] == pytest.approx(0.75 - np.hypot(0.6 - lows[0], 0.9 - lows[1]) / 2)
    assert san["high"] == pytest.approx(0.75 + np.hypot(0.6 - highs[0], 0.9 - highs[1]) / 2)
    (picture,) = figures(tmp_path / "two")
    assert "95% for the sampling of the test data" in picture.caption
    assert "seeds to each side" not in picture.caption


def test_methods_without_a_task_in_common_get_no_points(tmp_path):
    folder = write_suite(tmp_path, [row("f/a", "ssf", 0), row("f/b", "san", 0)])
    assert analyse(folder)["accuracy"] == []
    assert figures(folder) == []


def test_curves_are_means_over_blocks_and_ranges_over_seeds(tmp_path):
    rows = [row("f/a", "san", seed) for seed in range(2)]
    losses = {0: [float(step) for step in range(1, 401)], 1: [2.0 * step for step in range(1, 500)]}
    (curve,) = analyse(write_suite(tmp_path, rows, lambda one: losses[one["seed"]]))["curves"]
    assert len(curve["steps"]) == 40
    assert curve["steps"][:2] == [5.5, 15.5]
    assert curve["low"][:2] == [5.5, 15.5]
    assert curve["high"][:2] == [11.0, 31.0]
    assert curve["mean"][:2] == [8.25, 23.25]
    assert (curve["steps"][-1], curve["n_runs"]) == (395.5, 2)


@pytest.mark.parametrize(
    ("steps", "block", "left_out"), [(1, 1, 0), (32, 1, 0), (59, 2, 1), (157, 7, 3), (3000, 30, 0)]
)
def test_blocks_of_a_curve_are_equal(tmp_path, steps, block, left_out):
    losses = [float(step) for step in range(1, steps + 1)]
    folder = write_suite(tmp_path, [row("f/a", "san", 0)], lambda one: losses)
    (curve,) = analyse(folder)["curves"]
    assert curve["block"] == block
    assert curve["steps"] == curve["mean"]  # the loss is the number of the step
    assert curve["steps"][0] == left_out + (block + 1) / 2
    assert curve["steps"][-1] == steps - (block - 1) / 2
    assert set(np.diff(curve["steps"])) <= {block}
    (_, picture) = figures(folder)
    assert f"blocks of {block} step{'' if block == 1 else 's'}. n = 1 per" in picture.caption


def test_variance_of_scales_and_of_what_acts(tmp_path):
    vectors = {
        0: {"b.0.fc1": np.float32([1, 3]), "b.0.fc2": np.float32([1, 2])},
        1: {"b.0.fc1": np.float32([2, 2]), "b.0.fc2": np.float32([1, 4])},
    }
    rows = [row("f/a", "san", seed) for seed in range(2)]
    folder = write_suite(tmp_path, rows, scales=lambda one: Scales(vectors[one["seed"]], frozenset({"b.0.fc1"}), 1.0))
    variance = analyse(folder)["variance"]
    first, second = by(variance, layer="b.0.fc1"), by(variance, layer="b.0.fc2")
    assert (first["variance"], second["variance"]) == ((1 + 0) / 2, (0.25 + 2.25) / 2)
    assert first["acting"] == (16 + 0) / 2
    assert second["acting"] == second["variance"]
    assert (first["propagated"], second["propagated"]) == (True, False)
    assert (first["kind"], first["depth"], first["channels"], first["n_runs"]) == ("fc1", 0, 2, 2)
    assert first["exponents"] == [1.0]


def test_similarity_by_layer_and_overall(tmp_path):
    moved = {("f/a", 0): [0.1, 0], ("f/a", 1): [0.2, 0], ("f/b", 0): [0, 0.3], ("f/b", 1): [0, 0.1]}

    def scales(one):
        return Scales({"first": np.float32([1, 2]), "second": 1 + np.float32(moved[one["task"], one["seed"]])})

    rows = [row(task, "ssf", seed) for task, seed in moved]
    similarity = analyse(write_suite(tmp_path, rows, scales=scales))["similarity"]
    cosine = by(similarity, measure="cosine")
    first, second = cosine["layers"]
    assert first == {"layer": "first", "intra": 1.0, "inter": 1.0, "n_intra": 2, "n_inter": 2}
    assert (second["intra"], second["inter"]) == (pytest.approx(1.0), pytest.approx(0.0))
    # all layers together: (0, 1, x, y) of every two runs
    expected = np.mean([1.02 / np.sqrt(1.01 * 1.04), 1.03 / np.sqrt(1.09 * 1.01)])
    assert cosine["intra"] == pytest.approx(expected)
    assert cosine["inter"] < cosine["intra"]
    assert (cosine["n_runs"], cosine["n_tasks"], cosine["n_intra"], cosine["n_inter"]) == (4, 2, 2, 2)
    assert cosine["p"] == pytest.approx(0.5, abs=0.02)  # of two arrangements, one
    assert by(similarity, measure="correlation")["layers"][1]["inter"] == pytest.approx(-1.0)


def test_one_seed_gives_no_similarity_but_a_map(tmp_path):
    rows = [row(task, "san", 0) for task in TASKS]
    found = analyse(write_suite(tmp_path, rows, scales=scales_of_row))
    assert found["similarity"] == []
    assert [point["task"] for point in found["engrams"][0]["points"]] == sorted(TASKS)


def test_tasks_lie_apart_on_the_map(suite):
    engrams = by(analyse(suite)["engrams"], method="san")
    points = {task: np.array([(p["x"], p["y"]) for p in engrams["points"] if p["task"] == task]) for task in TASKS}
    centres = np.array([places.mean(axis=0) for places in points.values()])
    widest = max(np.linalg.norm(places - places.mean(axis=0), axis=1).max() for places in points.values())
    apart = [np.linalg.norm(centres[i] - centres[j]) for i in range(3) for j in range(i)]
    assert min(apart) > 2 * widest
    assert 0.5 < sum(engrams["shares"]) <= 1


def test_all_numbers_are_json(suite):
    found = analyse(suite)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# ---------------------------------------------------------------------------------------------- groups


def test_kinds_are_the_shortest_endings_that_tell_layers_apart():
    layers = [
        "vit.patch.projection",
        "vit.layer.0.attention.query",
        "vit.layer.0.attention.output.dense",
        "vit.layer.0.output.dense",
        "vit.layer.1.attention.query",
    ]
    found = layer_kinds(layers)
    assert [kind for kind, _ in found.values()] == [
        "projection",
        "query",
        "attention.output.dense",
        "layer.output.dense",
        "query",
    ]
    assert [depth for _, depth in found.values()] == [0, 0, 0, 0, 1]


def test_the_counterpart_is_the_one_of_the_same_host_and_size_on_the_same_tasks(tmp_path):
    sizes = {"san": 150, "ssf": 200, "san-none": 160, "lora-r8": 900, "lora-r1": 120, "san-lora-r8": 900, "full": 9000}
    kinds = {"lora-r8": "lora", "lora-r1": "lora", "san-lora-r8": "san-lora", "san-none": "san"}
    rows = [
        row(task, method, 0, kind=kinds.get(method, method), trainable_parameters=size)
        for method, size in sizes.items()
        for task in (TASKS[:1] if method == "san-none" else TASKS)
    ]

    def scales(one):
        fed = FED if one["method"] in ("san", "san-lora-r8") else frozenset()
        return None if one["method"] == "full" else pattern(one["task"], 0, propagated=fed)

    found = dict(pairs(read_groups(write_suite(tmp_path, rows, scales=scales))))
    assert {host: [group.method for group in groups] for host, groups in found.items()} == {
        "own": ["san", "san-none"],
        "lora": ["san-lora-r8", "lora-r8"],
    }
    assert [[run.key for run in group.runs] for group in found["own"]] == [[(TASKS[0], 0)]] * 2


def test_names_say_what_would_be_ambiguous(tmp_path):
    rows = [
        row("f/a", "san", 0, protocol="ssf"),
        row("f/a", "san", 0, protocol="vpt", recipe_fingerprint="other"),
        row("f/a", "ssf", 0, protocol="ssf"),
        row("f/a", "ssf", 0, backbone="swin", model="first"),
        row("f/a", "ssf", 0, backbone="swin", model="second", recipe_fingerprint="second"),
    ]
    found = {(group.backbone, group.method) for group in read_groups(write_suite(tmp_path, rows))}
    assert found == {
        ("vit", "san (ssf, last)"),
        ("vit", "san (vpt, last)"),
        ("vit", "ssf"),
        ("first", "ssf"),
        ("second", "ssf"),
    }


def test_two_recipes_for_one_run_are_refused(tmp_path):
    rows = [row("f/a", "san", 0), row("f/a", "san", 0, recipe_fingerprint="another")]
    with pytest.raises(SanError, match="seed 0 from two recipes"):
        figures(write_suite(tmp_path, rows))


def test_all_damaged_scales_are_named(tmp_path):
    folder = write_suite(tmp_path, [row("f/a", "san", seed) for seed in range(3)], scales=scales_of_row)
    for seed in (0, 2):
        (folder / row("f/a", "san", seed)["run"] / FILE).write_bytes(b"")
    with pytest.raises(SanError, match=r"scales of 2 runs:(.|\n)*0{15}0: .*scales\.safetensors(.|\n)*0{15}2: "):
        figures(folder)


# ---------------------------------------------------------------------------------------------- pictures


def test_a_suite_gives_every_picture_that_it_has_data_for(suite):
    pictures = {picture.name: picture for picture in figures(suite)}
    assert list(pictures) == [
        "accuracy",
        "histograms-own-vit",
        "variance-own-vit",
        "variance-vit",
        "similarity-vit",
        "engrams-vit",
        "curves-vit",
    ]
    captions = {name: picture.caption for name, picture in pictures.items()}
    assert "vit: n = 9 over 3 tasks" in captions["accuracy"]
    assert "san, with propagation and ssf, without propagation" in captions["histograms-own-vit"]
    assert "n = 9 runs of 3 tasks each" in captions["variance-own-vit"]
    assert "n = 3 per method and task" in captions["curves-vit"]
    assert "bands: minimum to maximum over seeds" in captions["curves-vit"]
    assert "small circles: seeds" in captions["accuracy"]
    assert "(n = 9 pairs)" in captions["similarity-vit"]
    assert "(n = 18 pairs)" in captions["similarity-vit"]
    assert "san: n = 9 runs" in captions["engrams-vit"]


def test_rows_alone_give_accuracy(tmp_path):
    assert [picture.name for picture in figures(write_suite(tmp_path, [row("f/a", "san", 0)]))] == ["accuracy"]


def test_the_ablation_of_order_has_a_picture_of_its_own(tmp_path):
    names = ("san-none", "san-reversed", "san", "san-shuffled")
    rows = [row("f/a", name, seed, 0.5, backbone) for name in names for seed in (0, 1) for backbone in ("vit", "swin")]
    (picture,) = figures(write_suite(tmp_path / "order", rows))
    assert picture.name == "order"
    assert [axes.get_title() for axes in picture.figure.axes] == ["vit", "swin"]
    labels = [text.get_text() for text in picture.figure.axes[0].get_yticklabels()]
    assert labels == ["san", "san-reversed", "san-shuffled", "san-none"]
    with_ssf = [*rows, row("f/a", "ssf", 0), row("f/a", "ssf", 0, backbone="swin")]
    names = [picture.name for picture in figures(write_suite(tmp_path / "both", with_ssf))]
    assert names == ["accuracy", "order"]


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_pictures_are_written_with_their_numbers(little, tmp_path, form):
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    written = write_pictures(little, tmp_path / "plots", form)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {path.name for path in written}
    for path in written[:-1]:
        assert path.suffix == f".{form}"
        assert path.read_bytes().startswith(starts[form])
    found = json.loads((tmp_path / "plots" / "analysis.json").read_text())
    assert list(found.pop("captions")) == [path.stem for path in written[:-1]]
    assert found == analyse(little)


def test_an_svg_is_xml_and_the_same_each_time(little, tmp_path):
    first, second = write_pictures(little, tmp_path / "1", "svg"), write_pictures(little, tmp_path / "2", "svg")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for path in first[:-1]:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.slow
def test_runs_that_were_trained(tmp_path):
    rows = []
    with small_scale():
        for method in ("san", "ssf", "linear"):
            one = row("digits", method, 0)
            rows.append(one)
            train(short_recipe(method, tmp_path / one["run"], optimizer__epochs=1))
        folder = write_suite(tmp_path, rows)
        pictures = {picture.name: picture for picture in figures(folder)}
    assert set(pictures) == {"accuracy", "histograms-own-vit", "variance-own-vit", "variance-vit", "curves-vit"}
    titles = [axes.get_title() for axes in pictures["histograms-own-vit"].figure.axes if axes.get_title()]
    assert {"fc1", "fc2", "q_proj", "k_proj", "v_proj", "o_proj"} <= set(titles)
    variance = analyse(folder)["variance"]
    assert {one["method"] for one in variance if one["acting"] > one["variance"]} == {"san"}
    for one in rows[:2]:
        assert (tmp_path / one["run"] / FILE).is_file()
        shutil.rmtree(tmp_path / one["run"] / "adapter")
    assert {picture.name for picture in figures(folder)} == set(pictures)
