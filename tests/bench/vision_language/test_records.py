"""Conversations about images: records and images."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from tests.bench.copies import write_picture
from transformers.models.llava import LlavaImageProcessorPil

from san_bench.vision_language.images import (
    FolderCount,
    mean_colour,
    pad_to_square,
    preflight,
    read_image,
    read_size,
)
from san_bench.vision_language.records import (
    Conversation,
    Turn,
    conversation_fingerprint,
    load_conversations,
    problems_of,
    read_conversations,
)
from san_peft.errors import SanError


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


BUS = {
    "id": "000000033471",
    "image": "coco/train2017/bus.jpg",
    "conversations": turns("<image>\nWhat is it?", "A bus.", "And its colour?", "Red."),
}
TEXT = {"id": "wgByO4Y_0", "model": "", "conversations": turns("Write a word.", "Word")}
NUMBER = {"id": 7, "image": "ocr_vqa/images/7.jpg", "conversations": turns("Who wrote it?\n<image>", "Me")}


def write(path, records):
    if path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records) + "\n", encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_a_file_of_records_is_read(tmp_path, ending):
    numbered = [] if ending == ".parquet" else [NUMBER]  # a column of parquet is text or numbers, not both
    records = load_conversations(write(tmp_path / f"mix{ending}", [BUS, TEXT, *numbered]))
    assert records[0] == Conversation(
        "000000033471",
        (
            Turn("human", "<image>\nWhat is it?"),
            Turn("gpt", "A bus."),
            Turn("human", "And its colour?"),
            Turn("gpt", "Red."),
        ),
        "coco/train2017/bus.jpg",
    )
    assert records[1] == Conversation("wgByO4Y_0", (Turn("human", "Write a word."), Turn("gpt", "Word")))
    assert [r.id for r in records[2:]] == [7] * len(numbered)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("text", ["it is a str, not an object with id and conversations"]),
        ({**BUS, "id": None}, ["id is missing"]),
        ({**BUS, "id": True}, ["id is True, not a string or integer"]),
        ({"id": 1}, ["conversations is missing"]),
        ({"id": 1, "conversations": []}, ["conversations is empty"]),
        ({**BUS, "image": 3}, ["image is '3', not a path"]),
        ({**BUS, "image": "../secret.jpg"}, ["image '../secret.jpg' is outside the image folder"]),
        ({**BUS, "image": "coco/../../x.jpg"}, ["image 'coco/../../x.jpg' is outside the image folder"]),
        ({**BUS, "image": "/etc/x.jpg"}, ["image '/etc/x.jpg' is outside the image folder"]),
        ({**BUS, "image": "C:\\x.jpg"}, ["image 'C:\\\\x.jpg' is outside the image folder"]),
        (
            {"id": 1, "conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Hello"}]},
            [
                "turn 0: expected human, since turns alternate, but it is gpt",
                "turn 1: expected gpt, since turns alternate, but it is human",
            ],
        ),
        ({"id": 1, "conversations": turns("Hello")}, ["it has 1 turns, so the last one is not an answer"]),
        ({"id": 1, "conversations": turns("Hello", " \n")}, ["turn 1: the answer is empty"]),
        (
            {"id": 1, "conversations": [{"from": "humen", "value": "a"}, {"from": "gpt"}]},
            [
                "turn 0: unknown role 'humen'. Did you mean 'human'? Choose from human, gpt.",
                "turn 1: value is missing",
            ],
        ),
        ({"id": 1, "conversations": [{"value": "a"}, {"from": "gpt", "value": 3}]}, None),
        ({**TEXT, "image": "a.jpg"}, ["there is an image, but no marker <image> in turn 0"]),
        ({**BUS, "image": None}, ["the marker <image> is in turn 0, but there is no image"]),
        (
            {**BUS, "conversations": turns("What?", "A", "<image>", "B")},
            ["the marker <image> is in turn 2, not in turn 0"],
        ),
        (
            {**BUS, "conversations": turns("<image><image>", "A <image>")},
            ["the marker <image> is in turn 1, not in turn 0", "the marker <image> is 2 times in turn 0"],
        ),
    ],
)
def test_each_kind_of_bad_record_is_explained(record, said):
    assert problems_of(record) == (said or ["turn 0: from is missing", "turn 1: value is a int, not a string"])


def test_all_bad_records_are_counted_and_the_first_are_listed(tmp_path):
    path = write(tmp_path / "mix.json", [BUS, *[{"id": n} for n in range(25)], TEXT])
    with pytest.raises(SanError, match=r"25 of 27 records") as error:
        load_conversations(path)
    lines = str(error.value).splitlines()
    assert lines[1] == "  record 1 (id 0): conversations is missing"
    assert lines[20:22] == ["  record 20 (id 19): conversations is missing", "  and 5 more"]
    good, bad = read_conversations(path)
    assert [record.id for record in good] == [BUS["id"], TEXT["id"]]
    assert [record.index for record in bad] == list(range(1, 26))


def test_json_lines_are_read_whatever_they_are_called(tmp_path):
    (tmp_path / "mix.json").write_text(json.dumps(BUS) + "\n" + json.dumps(TEXT))
    assert [record.id for record in load_conversations(tmp_path / "mix.json")] == [BUS["id"], TEXT["id"]]


def test_files_that_are_none_are_explained(tmp_path):
    with pytest.raises(SanError, match="There is no conversation file"):
        load_conversations(tmp_path / "mix.json")
    (tmp_path / "mix.json").write_text("[" + json.dumps(BUS))
    with pytest.raises(SanError, match="JSON list"):
        load_conversations(tmp_path / "mix.json")
    for written in (json.dumps(BUS), json.dumps(BUS, indent=1)):
        (tmp_path / "one.json").write_text(written)
        with pytest.raises(SanError, match="dict, not a list"):
            load_conversations(tmp_path / "one.json")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(SanError, match="no records"):
        load_conversations(tmp_path / "none.json")
    (tmp_path / "mix.jsonl").write_text("{\n" + json.dumps(TEXT) + "\nno")
    with pytest.raises(
        SanError, match=r"2 of 3 records(.|\n)*record 0 .*it is not JSON(.|\n)*record 2 .*it is not JSON"
    ):
        load_conversations(tmp_path / "mix.jsonl")
    (tmp_path / "mix.parquet").write_bytes(b"nothing")
    with pytest.raises(SanError, match="parquet"):
        load_conversations(tmp_path / "mix.parquet")
    (tmp_path / "mix.csv").write_text("")
    with pytest.raises(SanError, match=r"ends in '\.csv'\. Choose from \.json, \.jsonl, \.parquet"):
        load_conversations(tmp_path / "mix.csv")


def test_the_fingerprint_is_of_the_content(tmp_path):
    records = load_conversations(write(tmp_path / "mix.json", [BUS, TEXT]))
    again = load_conversations(write(tmp_path / "mix.jsonl", [{**BUS, "more": 1}, TEXT]))
    assert conversation_fingerprint(records) == conversation_fingerprint(again)
    assert conversation_fingerprint(records[::-1]) != conversation_fingerprint(records)
    answer = {**BUS, "conversations": turns("<image>\nWhat is it?", "A bus.", "And its colour?", "Blue.")}
    other = load_conversations(write(tmp_path / "mix.json", [answer, TEXT]))
    assert conversation_fingerprint(other) != conversation_fingerprint(records)
    for place in "ab":
        write_picture(tmp_path / place / "coco/train2017/bus.jpg", 1)
    whole = conversation_fingerprint(records, tmp_path / "a")
    assert whole == conversation_fingerprint(records, tmp_path / "b") != conversation_fingerprint(records)
    (tmp_path / "b/coco/train2017/bus.jpg").write_bytes(b"shorter")
    assert whole != conversation_fingerprint(records, tmp_path / "b") != conversation_fingerprint(records, tmp_path)


def about(*files):
    return [Conversation(n, (Turn("human", "<image>"), Turn("gpt", "Yes")), file) for n, file in enumerate(files)]


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "images"
    for name in ("coco/train2017/1.jpg", "coco/train2017/2.jpg", "ocr_vqa/images/3.jpg"):
        write_picture(root / name, 1)
    Image.new("P", (4, 4)).save(root / "ocr_vqa/images/4.gif")
    shutil.move(root / "ocr_vqa/images/4.gif", root / "ocr_vqa/images/4.jpg")
    whole = (root / "coco/train2017/2.jpg").read_bytes()
    (root / "coco/train2017/2.jpg").write_bytes(whole[: len(whole) // 2])
    write_picture(tmp_path / "outside.jpg", 1)
    return root


FILES = (
    "coco/train2017/1.jpg",
    "coco/train2017/2.jpg",
    "coco/train2017/2.jpg",
    "ocr_vqa/images/3.jpg",
    "ocr_vqa/images/4.jpg",
    "vg/VG_100K/5.jpg",
    "../outside.jpg",
    None,
)


def test_preflight_says_what_is_wrong_and_drops_nothing(pictures):
    found = preflight(about(*FILES), pictures, workers=2)
    assert found.dropped == ()
    assert [record.image for record in found.kept] == list(FILES)
    said = [f"{problem.level}: {problem}" for problem in found.problems]
    assert said[:2] == [
        "error: images: 1 paths are outside the image folder, which 1 conversations are about: ../outside.jpg",
        "error: images: 1 images are missing, which 1 conversations are about: vg/VG_100K/5.jpg",
    ]
    assert said[2].startswith(
        "error: images: 1 images cannot be read, which 2 conversations are about: coco/train2017/2.jpg ("
    )
    assert said[3] == (
        "warning: images: 1 images do not have the format of their suffix, which 1 conversations are about: "
        "ocr_vqa/images/4.jpg (GIF)"
    )
    assert found.folders == {
        "coco/train2017": FolderCount(images=2, missing=0, unreadable=1, mislabelled=0),
        "ocr_vqa/images": FolderCount(images=2, missing=0, unreadable=0, mislabelled=1),
        "vg/VG_100K": FolderCount(images=1, missing=1, unreadable=0, mislabelled=0),
    }
    said = r"1 paths .*\n.*1 images are missing.*\n.*cannot be read.*\n.*conversation.drop_bad_images=true"
    with pytest.raises(SanError, match=said):
        found.require()


def test_preflight_drops_on_request_and_keeps_what_can_be_read(pictures):
    found = preflight(about(*FILES), pictures, drop=True)
    assert [record.id for record in found.require()] == [0, 3, 4, 7]
    assert [record.id for record in found.dropped] == [1, 2, 5, 6]
    assert preflight(about(FILES[0]), pictures).require() == tuple(about(FILES[0]))
    with pytest.raises(SanError, match="no conversation is left"):
        preflight(about(FILES[1]), pictures, drop=True).require()
    with pytest.raises(SanError, match="There is no image folder"):
        preflight([], pictures / "nowhere")


def test_a_report_names_every_bad_image_with_its_records(pictures):
    report = preflight(about(*FILES), pictures, drop=True).report()
    assert (report["conversations"], report["dropped"]) == (8, 4)
    assert report["folders"]["vg/VG_100K"] == {"images": 1, "missing": 1, "unreadable": 0, "mislabelled": 0}
    bad = {one["image"]: (one["reason"].split()[0], one["dropped"], one["records"]) for one in report["bad"]}
    assert bad == {
        "coco/train2017/2.jpg": ("unreadable", True, [1, 2]),
        "ocr_vqa/images/4.jpg": ("mislabelled", False, [4]),
        "vg/VG_100K/5.jpg": ("missing", True, [5]),
        "../outside.jpg": ("outside", True, [6]),
    }


def test_an_image_is_read_in_colour_from_below_its_folder_alone(pictures):
    assert read_image(pictures, "ocr_vqa/images/4.jpg").mode == "RGB"
    with pytest.raises(SanError, match="outside the image folder"):
        read_image(pictures, "../outside.jpg")
    with pytest.raises(SanError, match=r"cannot be read.*`san data check`"):
        read_image(pictures, "coco/train2017/2.jpg")


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (5, 5)])
def test_padding_is_that_of_transformers(size):
    mean = (0.48145466, 0.4578275, 0.40821073)
    assert mean_colour(mean) == (122, 116, 104)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    ours = np.asarray(pad_to_square(image, mean_colour(mean)))
    theirs = LlavaImageProcessorPil().pad_to_square(np.asarray(image).transpose(2, 0, 1), mean_colour(mean))
    np.testing.assert_array_equal(ours.transpose(2, 0, 1), theirs)


def test_images_are_decoded_as_those_of_classes_are(tmp_path):
    """16-bit values are scaled, not clipped; the EXIF orientation is applied, to the size as well."""
    Image.new("I;16", (2, 2), 257).save(tmp_path / "deep.png")
    assert read_image(tmp_path, "deep.png").getpixel((0, 0)) == (1, 1, 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (6, 4), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_size(tmp_path, "turned.jpg") == read_image(tmp_path, "turned.jpg").size == (4, 6)
