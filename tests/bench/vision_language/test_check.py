"""`san data check` of conversations about images: records, images, benchmarks."""

from __future__ import annotations

import pytest
from PIL import Image
from tests.bench.copies import write_picture
from tests.bench.vision_language.vqa.test_files import dump, lines

from san_bench.datacheck.check import check_command, examine
from san_peft.errors import SanError


def record(number, image=None):
    asked = "<image>\nWhat?" if image else "What?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "A bus."}]
    return {"id": number, "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def mine(tmp_path):
    """Records of one's own: five to train with, two to ask."""
    folder = tmp_path / "mine"
    for number in range(4):
        write_picture(folder / "images" / f"{number}.png", number)
    dump(folder / "train.json", [*(record(n, f"images/{n % 3}.png") for n in range(4)), record(4)])
    dump(folder / "test.json", [record(5, "images/3.png"), record(6)])
    return folder


@pytest.fixture
def llava(tmp_path):
    """LLaVA's mix of one record, with GQA, whose second image is missing, and POPE, which lacks its labels."""
    folder = tmp_path / "llava"
    dump(folder / "llava_v1_5_mix665k.json", [record(1)])
    row = {"question": "Is it?", "answer": "no"}
    dump(
        folder / "eval/gqa/data/testdev_balanced_questions.json",
        {"1": {**row, "imageId": "a"}, "2": {**row, "imageId": "b"}},
    )
    asked = [{"question_id": str(n), "image": f"{i}.jpg", "text": "Is it?"} for n, i in ((1, "a"), (2, "b"))]
    lines(folder / "eval/gqa/llava_gqa_testdev_balanced.jsonl", *asked)
    write_picture(folder / "eval/gqa/data/images/a.jpg", 1)
    (folder / "eval/pope").mkdir()
    return folder


def said(suite, folder, **options):
    return [f"{problem.level}: {problem}" for one in examine(suite, folder, **options) for problem in one.problems]


def test_good_records_have_no_problem(mine, capsys):
    check_command("conversations", mine)
    assert capsys.readouterr().out.splitlines() == [
        "conversations/train: 5 records, 4 of them about 3 images",
        "conversations/test: 2 records, 1 of them about 1 images",
        "No problems.",
    ]


def test_every_problem_of_records_is_found_at_once(mine):
    (mine / "images/0.png").unlink()
    (mine / "images/1.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(mine / "images/2.png", format="JPEG")
    dump(mine / "test.json", [record(5, "images/3.png"), {"id": 6}])
    problems = said("conversations", mine)
    missing = "error: conversations/train: 1 images are missing, which 2 conversations are about: images/0.png"
    bad = "error: conversations/test: 1 of 2 records are invalid: record 1 (id 6): conversations is missing"
    assert problems[0] == missing
    assert problems[1].startswith("error: conversations/train: 1 images cannot be read, which 1 conversations")
    assert problems[2].startswith("warning: conversations/train: 1 images do not have the format of their suffix")
    assert problems[3:] == [bad]
    assert said("conversations", mine, images=False) == [missing, bad]


def test_the_benchmarks_of_llava_that_are_there_are_checked(llava, capsys):
    with pytest.raises(SystemExit) as stop:
        check_command("llava", llava)
    assert stop.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        "llava/train: 1 records, 0 of them about 0 images",
        f"llava/vqav2: missing, no folder {llava / 'eval/vqav2'}",
    ]
    assert "llava/gqa: 2 questions about 2 images" in printed
    problems = [line for line in printed if line.startswith("error")]
    assert problems == [
        f"error: llava/gqa: 1 images are missing, which 1 questions are about, below {llava / 'eval/gqa/data/images'}: "
        "b.jpg",
        f"error: llava/pope: There is no file {llava / 'eval/pope/llava_pope_test.jsonl'}.",
    ]
    assert printed[-1] == "2 errors, 0 warnings"
    assert said("llava/gqa", llava) == problems[:1]
    (llava / "eval/gqa/data/images/b.jpg").write_text("no image")
    assert said("llava/gqa", llava, images=False) == []
    assert "1 images cannot be read, which 1 questions are about" in said("llava/gqa", llava)[0]


def test_what_cannot_be_checked_is_explained(mine, llava, tmp_path):
    assert said("llava/sqa", llava) == [f"error: llava/sqa: there is no folder {llava / 'eval/scienceqa'}"]
    assert said("llava", mine)[0] == (
        f"error: llava/train: There is no conversation file {mine / 'llava_v1_5_mix665k.json'}."
    )
    with pytest.raises(SanError, match=r"llava has no benchmark 'gqaa'\. Did you mean 'gqa'"):
        examine("llava/gqaa", llava)
    with pytest.raises(SanError, match="There is no folder"):
        examine("conversations", tmp_path / "nowhere")
    with pytest.raises(SanError, match="llava"):
        examine("llava", llava, write_checksums=tmp_path / "sums")
    with pytest.raises(SanError, match=r"'lava'.*Did you mean 'llava'"):
        examine("lava", llava)
