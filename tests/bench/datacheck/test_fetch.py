"""`san data fetch`, with sources that answer from this folder."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import datasets
import httpx
import huggingface_hub
import pytest
import torchvision
from tests.bench import copies
from tests.bench.copies import FGVC, GIC, VTAB, community, parquet, table

from san_bench.datacheck.fetch import STAGE, fetch, fetch_command
from san_bench.datacheck.manifest import load_manifest
from san_peft.errors import SanError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set; `hub.fail` stops it halfway, `hub.rows` is what it has."""
    state = SimpleNamespace(fail=False, rows={"train": table(9, 3), "test": table(6, 3, 1)}, size=1000, calls=[])

    def info(self, repository, files_metadata):
        assert files_metadata
        siblings = [SimpleNamespace(size=state.size), SimpleNamespace(size=None)]
        return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license="mit"), sha="abc")

    def download(repository, repo_type, revision, local_dir):
        state.calls.append((repository, repo_type, revision))
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        if state.fail:
            (local_dir / "half").write_bytes(b"1")
            raise httpx.ConnectError("the line is down")
        (local_dir / "half").unlink(missing_ok=True)
        parquet(local_dir / "data", state.rows)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return state


def test_a_data_set_of_the_hub_is_fetched_checked_and_put_in_place(tmp_path, hub, capsys):
    assert fetch("gic/cifar100", tmp_path / "data", GIC) == []
    assert hub.calls == [("someone/cifar100", "dataset", "abc")]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar100"]
    assert [path.name for path in (tmp_path / "data" / "cifar100").iterdir()] == ["data"]
    assert "0 MB from huggingface.co/datasets/someone/cifar100, license: mit" in capsys.readouterr().out
    assert fetch("gic/cifar100", tmp_path / "data", GIC) == []
    assert len(hub.calls) == 1


def test_an_interrupted_fetch_leaves_nothing_in_place_and_goes_on(tmp_path, hub):
    hub.fail = True
    with pytest.raises(SanError, match=r"the line is down.*fetching/cif"):
        fetch("gic/cifar100", tmp_path, GIC)
    assert not (tmp_path / "cifar100").exists()
    assert (tmp_path / STAGE / "cifar100" / "half").exists()
    hub.fail = False
    assert fetch("gic/cifar100", tmp_path, GIC) == []
    assert (tmp_path / "cifar100" / "data").is_dir()


def test_what_is_fetched_but_wrong_is_not_put_in_place(tmp_path, hub):
    hub.rows = {"train": table(9, 3), "test": table(5, 3, 1)}
    with pytest.raises(SanError, match=r"gic/cifar100(.|\n)*test has 5 images, not 6"):
        fetch("gic/cifar100", tmp_path, GIC)
    assert not (tmp_path / "cifar100").exists()


def test_a_full_disk_is_said_before(tmp_path, hub):
    hub.size = 10**18
    with pytest.raises(SanError, match=r"MB .* 1,000,000,000,000 MB"):
        fetch("gic/cifar100", tmp_path, GIC)
    assert not hub.calls


def test_any_data_set_of_the_hub_becomes_a_task_of_its_own(tmp_path, hub):
    assert fetch("someone/cats", tmp_path) == []
    assert (tmp_path / "cats" / "data").is_dir()
    with pytest.raises(SanError, match="cats already exists"):
        fetch("someone/cats", tmp_path)


def test_what_cannot_be_fetched_says_where_it_is(tmp_path, hub):
    (problem,) = fetch("gic", tmp_path, GIC)
    assert str(problem) == "gic/imagenet-1k: download ImageNet-1k manually (a form); license: none"
    assert (tmp_path / "cifar100").is_dir()
    assert len(fetch("vtab", tmp_path / "other", VTAB)) == 2


def test_what_is_there_is_checked_and_not_fetched_again(tmp_path):
    place = community(tmp_path, VTAB["cifar"])
    assert fetch("vtab/cifar", tmp_path, VTAB) == []
    (place / "test.txt").unlink()
    assert [str(problem) for problem in fetch("vtab/cifar", tmp_path, VTAB)] == [
        "vtab/cifar: the list test.txt is missing",
        "vtab/cifar: split test is missing",
    ]


def test_torchvision_fetches_flowers(tmp_path, monkeypatch):
    tries = []

    def download(root, download):
        assert download
        tries.append(root)
        if len(tries) == 1:
            raise RuntimeError("File not found or corrupted.")
        copies.flowers(tmp_path / "made")
        shutil.move(tmp_path / "made", f"{root}/flowers-102")
        (tmp_path / STAGE / "flowers-102" / "102flowers.tgz").write_bytes(b"archive")

    monkeypatch.setattr(torchvision.datasets, "Flowers102", download)
    with pytest.raises(SanError, match=r"Flowers102 .*corrupted"):
        fetch("fgvc/flowers", tmp_path, FGVC)
    assert fetch("fgvc/flowers", tmp_path, FGVC) == []
    assert sorted(path.name for path in (tmp_path / "flowers-102").iterdir()) == ["imagelabels.mat", "jpg", "setid.mat"]
    assert not (tmp_path / STAGE).exists()


def test_the_command_says_what_is_left_to_do_and_ends_with_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fetch_command("vtab", tmp_path)
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 19 + 2
    assert "vtab/sun397: download SUN397 manually (see below); license: research only" in out
    assert load_manifest("vtab").get in out
    assert out.splitlines()[-1] == f"Then: san data check vtab {tmp_path}"


def test_unknown_names_are_answered_with_known_ones(tmp_path):
    with pytest.raises(SanError, match=r"'vtba'.*Did you mean 'vtab'\?"):
        fetch("vtba", tmp_path)
    with pytest.raises(SanError, match="The suite gic has no task 'cifar10'"):
        fetch("gic/cifar10", tmp_path)
