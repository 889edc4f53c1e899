"""The files of the seven benchmarks of LLaVA-1.5, in the layouts in which they are published."""

from __future__ import annotations

import base64
import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from san_bench.vision_language.submission import submission
from san_bench.vision_language.vqa import files as vqa_files
from san_bench.vision_language.vqa import uploads as vqa_uploads
from san_bench.vision_language.vqa.benchmarks import Question
from san_bench.vision_language.vqa.formats import LETTER, SHORT
from san_peft.errors import SanError


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def people(*answers):
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(answers)]


def test_vqav2(tmp_path):
    asked = lines(
        tmp_path / "llava_vqav2_mscoco_val2014.jsonl",
        {
            "question_id": 262148000,
            "image": "COCO_val2014_000000262148.jpg",
            "text": f"Where?\n{SHORT}",
            "category": "default",
        },
    )
    notes = {"question_id": 262148000, "image_id": 262148, "answers": people(*["down"] * 9, "up")}
    notes = dump(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [notes]})
    (question,) = vqa_files.load_vqav2(asked, notes)
    assert question.answers == ("down",) * 9 + ("up",)
    rows = [{"question_id": 262148000, "image_id": 262148, "question": "Where?"}]
    plain = dump(tmp_path / "v2_OpenEnded.json", {"data_subtype": "val2014", "questions": rows})
    assert vqa_files.load_vqav2(plain, notes) == [question]
    assert vqa_files.load_vqav2(plain)[0].answers == ()
    other = dump(tmp_path / "other.json", {"annotations": [{"question_id": 1, "answers": people("a")}]})
    with pytest.raises(SanError, match="lacks 1 of 1 questions, such as 262148000"):
        vqa_files.load_vqav2(asked, other)
    two = [question, replace(question, id=5)]
    vqa_uploads.write_vqav2(tmp_path / "up.json", two, ["The Dog's.", None])
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"question_id": 262148000, "answer": "dog 's"},
        {"question_id": 5, "answer": ""},
    ]


def test_vizwiz(tmp_path):
    row = {"image": "VizWiz_val_00000000.jpg", "question": "What is it?", "answers": people("can", "unanswerable")}
    notes = dump(tmp_path / "val.json", [row])
    (question,) = vqa_files.load_vizwiz(notes)
    assert question.answers == ("can", "unanswerable")
    assert question.text == (
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT
    )


def test_textvqa_and_its_answers(tmp_path):
    ocr = f"What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL\n{SHORT}"
    image = {"question_id": "003a8ae2ef43b901", "image": "003a8ae2ef43b901.jpg", "category": "default"}
    asked = [{**image, "text": ocr}, {**image, "text": f"Which year?\nReference OCR token: 1999\n{SHORT}"}]
    rows = [
        {"image_id": image["question_id"], "question": "which Year?", "answers": ["1999"] * 10},
        {"image_id": image["question_id"], "question": "what is the brand of this camera?", "answers": ["dakota"] * 10},
    ]
    notes = dump(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    questions = vqa_files.load_textvqa(lines(tmp_path / "ocr.jsonl", *asked), notes)
    assert [question.answers[0] for question in questions] == ["dakota", "1999"]
    bare = lines(tmp_path / "bare.jsonl", {**image, "text": f"Which year?\n{SHORT}"})
    with pytest.raises(SanError, match="no question has a line 'Reference OCR token: '"):
        vqa_files.load_textvqa(bare, notes)
    said = [{"question_id": image["question_id"], "prompt": a["text"], "text": str(n)} for n, a in enumerate(asked)]
    answers = vqa_uploads.read_answers(lines(tmp_path / "answers.jsonl", *said[::-1]), questions)
    assert answers == ["0", "1"]
    assert vqa_uploads.read_answers(lines(tmp_path / "one.jsonl", said[1]), questions) == [None, "1"]


def test_answers_that_do_not_fit_are_explained(tmp_path):
    questions = [Question(n, f"{n}.jpg", f"Why?\n{SHORT}") for n in (0, 1)]
    row = {"question_id": 0, "text": "a"}
    assert vqa_uploads.read_answers(lines(tmp_path / "a.jsonl", row), questions) == ["a", None]
    with pytest.raises(SanError, match="answers the question 0 twice"):
        vqa_uploads.read_answers(lines(tmp_path / "a.jsonl", row, row), questions)
    with pytest.raises(SanError, match="answers 1 unknown questions, such as 9"):
        vqa_uploads.read_answers(lines(tmp_path / "a.jsonl", {**row, "question_id": 9}), questions)
    with pytest.raises(SanError, match="1 of 2 rows have no text, the first is row 1"):
        vqa_uploads.read_answers(lines(tmp_path / "a.jsonl", row, {"question_id": 1}), questions)
    with pytest.raises(SanError, match="There is no file"):
        vqa_uploads.read_answers(tmp_path / "none.jsonl", questions)
    (tmp_path / "bad.jsonl").write_text('{"question_id": 0, "text": "a"}\nno\n')
    with pytest.raises(SanError, match=r"line 2: not JSON"):
        vqa_uploads.read_answers(tmp_path / "bad.jsonl", questions)


def test_gqa(tmp_path):
    row = {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "isBalanced": True}
    notes = dump(tmp_path / "testdev_balanced_questions.json", {"201307251": row})
    text = f"Is it overcast?\n{SHORT}"
    asked = {"question_id": "201307251", "image": "n161313.jpg", "text": text, "category": "default"}
    asked = lines(tmp_path / "llava_gqa.jsonl", asked)
    assert vqa_files.load_gqa(notes, asked) == [Question("201307251", "n161313.jpg", text, ("no",))]
    with pytest.raises(SanError, match=r"list.json.* GQA"):
        vqa_files.load_gqa(dump(tmp_path / "list.json", [row]), asked)


def test_pope(tmp_path):
    asked = []
    for number, category in enumerate(("random", "popular", "adversarial", "random")):
        text = f"Is there a {number} in the image?"
        asked.append(
            {"question_id": number, "image": f"{number}.jpg", "text": f"{text}\n{SHORT}", "category": category}
        )
    labels = {0: "yes", 1: "no", 2: "no", 3: "no"}
    for category in ("random", "popular", "adversarial"):
        rows = [a for a in asked if a["category"] == category]
        lines(
            tmp_path / f"coco_pope_{category}.json",
            *(
                {
                    "question_id": n,
                    "image": a["image"],
                    "text": a["text"].split("\n")[0],
                    "label": labels[a["question_id"]],
                }
                for n, a in enumerate(rows, 1)
            ),
        )
    questions = vqa_files.load_pope(lines(tmp_path / "llava_pope_test.jsonl", *asked), tmp_path)
    assert [(q.id, q.category, *q.answers) for q in questions] == [
        (0, "random", "yes"),
        (1, "popular", "no"),
        (2, "adversarial", "no"),
        (3, "random", "no"),
    ]
    path = tmp_path / "coco_pope_popular.json"
    whole = path.read_text()
    path.write_text(whole.replace('"label": "no"', '"label": "maybe"'))
    said = r"coco_pope_popular.json: the answer to the question 1 is 'maybe'.* yes, no\."
    with pytest.raises(SanError, match=said):
        vqa_files.load_pope(tmp_path / "llava_pope_test.jsonl", tmp_path)
    path.write_text(whole)
    swapped = lines(tmp_path / "swapped.jsonl", *asked[::-1])
    with pytest.raises(SanError, match="is about 'Is there a 0 in the image\\?' where"):
        vqa_files.load_pope(swapped, tmp_path)
    with pytest.raises(SanError, match=r"has 2 labels, but .* 1 random questions"):
        vqa_files.load_pope(lines(tmp_path / "few.jsonl", *asked[:3]), tmp_path)


def test_scienceqa(tmp_path):
    base = {"choices": ["cat", "bus"], "answer": 1, "image": "image.png"}
    problems = {"4": base, "5": {**base, "image": None}, "6": base, "7": base}
    dump(tmp_path / "problems.json", problems)
    dump(tmp_path / "pid_splits.json", {"train": ["7"], "test": ["4", "5", "6"]})
    own = [
        {"id": key, "image": f"{key}/image.png", "conversations": [{"from": "human", "value": f"Q{key}\n<image>"}]}
        for key in ("4", "6")
    ]
    asked = dump(tmp_path / "llava_test_CQM-A.json", own)
    assert vqa_files.load_sqa(tmp_path, asked) == [
        Question("4", "4/image.png", f"Q4\n{LETTER}", ("B",), options=("cat", "bus")),
        Question("6", "6/image.png", f"Q6\n{LETTER}", ("B",), options=("cat", "bus")),
    ]
    with pytest.raises(SanError, match="does not ask the question 6"):
        vqa_files.load_sqa(tmp_path, dump(tmp_path / "few.json", own[:1]))
    with pytest.raises(SanError, match="has no split 'val', only train, test"):
        vqa_files.load_sqa(tmp_path, asked, "val")
    said = r"problems.json: the answer to the question '4' is {}; .* 0 \(cat\), 1 \(bus\)\."
    for answer in (2, -1, "B"):
        dump(tmp_path / "problems.json", {**problems, "4": {**base, "answer": answer}})
        with pytest.raises(SanError, match=said.format(repr(answer))):
            vqa_files.load_sqa(tmp_path, asked)
    dump(tmp_path / "problems.json", {"4": base, "5": base})
    with pytest.raises(SanError, match=r"problems.json: 1 of 3 rows have no choices, the first is row 2"):
        vqa_files.load_sqa(tmp_path, asked)


COLUMNS = "index question hint A B C D answer category image source l2-category comment split".split()


@pytest.fixture
def table(tmp_path):
    """Three rows: one with a hint and a long image, its rotation, which names that image, and one of two options."""
    image = base64.b64encode(b"pixels" * 40_000).decode()  # longer than a cell may be by default
    rows = [
        [7, "What?", "A hint.", "cat", "dog", "bus", "nan", "B", "kind", image, "s", "l", "nan", "dev"],
        [1_000_007, "What?", "A hint.", "dog", "bus", "cat", "", "A", "kind", "7", "s", "l", "nan", "dev"],
        [8, "Why\nso?", "nan", "x", "y", "", "", "", "kind", image, "s", "l", "nan", "dev"],
    ]
    with (tmp_path / "mmbench_dev_20230712.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([COLUMNS, *rows])
    return tmp_path / "mmbench_dev_20230712.tsv"


def test_mmbench(table):
    questions = vqa_files.load_mmbench(table)
    text = f"A hint.\nWhat?\nA. cat\nB. dog\nC. bus\n{LETTER}"
    assert questions[0] == Question(7, b"pixels" * 40_000, text, ("B",), "kind", ("cat", "dog", "bus"))
    assert (questions[1].image, questions[1].answers) == (b"pixels" * 40_000, ("A",))
    assert (questions[2].text, questions[2].answers) == (f"Why\nso?\nA. x\nB. y\n{LETTER}", ())
    assert vqa_files.with_rotations(questions[:2]) == questions[:2]
    table.write_text("index\tquestion\tA\tB\timage\tanswer\n1\tWhat?\tx\ty\tAAAA\tC\n")
    with pytest.raises(SanError, match=r"tsv: the answer to the question '1' is 'C'.* A \(x\), B \(y\)"):
        vqa_files.load_mmbench(table)
    table.write_text("index\tquestion\tA\tB\timage\n1\tWhat?\tx\ty\t#!\n")
    with pytest.raises(SanError, match="index 1: the image is not base64"):
        vqa_files.load_mmbench(table)
    table.write_text("index\tquestion\n1\tWhat?\n")
    with pytest.raises(SanError, match="has no column A, B, image"):
        vqa_files.load_mmbench(table)


UPLOADED = [
    ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
    ["7", "What?", "cat", "dog", "bus", "nan", "B", "B", "dev"],
    ["1000007", "What?", "dog", "bus", "cat", "", "", "A", "dev"],
    ["8", "Why\nso?", "x", "y", "", "", "A", "", "dev"],
]


def test_mmbenchs_upload_is_a_table_without_openpyxl(table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.warns(UserWarning, match="openpyxl is not installed"):
        path = vqa_uploads.write_mmbench(tmp_path / "up.xlsx", table, vqa_files.load_mmbench(table), ["B", None, "A"])
    assert path == tmp_path / "up.tsv"
    said = lines(tmp_path / "said.jsonl", {"question_id": 7, "text": "B"}, {"question_id": 8, "text": "A"})
    with pytest.raises(SanError, match=r"up.tsv already exists"):
        submission(said, "mmbench", table, tmp_path / "up.xlsx")
    with pytest.warns(UserWarning, match="openpyxl is not installed"):
        assert submission(said, "mmbench", table, tmp_path / "other.xlsx").read_bytes() == path.read_bytes()
    with path.open(newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == UPLOADED


def test_mmbenchs_upload_is_a_spreadsheet_with_openpyxl(table, tmp_path, monkeypatch):
    rows: list[list[object]] = []
    book = SimpleNamespace(active=rows, save=lambda file: file.write(b"a spreadsheet"))
    monkeypatch.setitem(sys.modules, "openpyxl", SimpleNamespace(Workbook=lambda: book))
    path = vqa_uploads.write_mmbench(tmp_path / "up.xlsx", table, vqa_files.load_mmbench(table), ["B", None, "A"])
    assert (path, path.read_bytes()) == (tmp_path / "up.xlsx", b"a spreadsheet")
    assert [[str(cell) for cell in row] for row in rows] == UPLOADED
    assert rows[1][0] == 7


@pytest.mark.parametrize("answers", ["red", [{"reply": "red"}], [3], None])
def test_answers_that_are_none_are_named(tmp_path, answers):
    row = {"image": "a.jpg", "question": "What is it?", "answers": answers}
    with pytest.raises(SanError, match=r"val.json: the answers to 'a.jpg' are "):
        vqa_files.load_vizwiz(dump(tmp_path / "val.json", [row]))
