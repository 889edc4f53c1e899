"""The seven benchmarks of LLaVA-1.5: rules, scores by hand, the command of lmms-eval."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from san_bench.vision_language.vqa import files as vqa_files
from san_bench.vision_language.vqa.benchmarks import (
    BENCHMARKS,
    Question,
    Score,
    lmms_command,
    score_benchmark,
    score_pope,
    vqa_accuracy,
)
from san_bench.vision_language.vqa.formats import LETTER, SHORT
from san_bench.vision_language.vqa.normalize import (
    CONTRACTIONS,
    choice_letter,
    normalise_answer,
    normalise_for_upload,
    normalise_gqa,
    says_no,
    science_letter,
)
from san_peft.errors import SanError


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Cat", "cat"),
        ("two dogs and a bird", "2 dogs and bird"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("red/white", "red white"),  # no space beside it: it becomes one
        ("red / white", "red white"),  # a space beside it: it goes
        ("t-shirt", "t shirt"),
        ("yes, please", "yes please"),
        ("1,000", "1000"),  # a comma between digits: every sign goes
        ("1,000-2", "10002"),
        ("3.5 in.", "3.5 in"),  # a period before a digit stays
        ("yes.", "yes"),
        ("a\nb\tc", "b c"),
        ("man's", "man's"),
    ],
)
def test_answers_are_normalised_as_in_the_vqa_evaluation(answer, normal):
    assert normalise_answer(answer) == normal


def test_textvqa_takes_words_apart_first():
    assert normalise_for_upload("The man's hat, 1,000?") == "man 's hat 1000"
    assert normalise_for_upload("THE COCA-COLA") == "coca cola"
    assert normalise_gqa("The Left..") == "the left"


def test_the_table_of_contractions_is_the_published_one():
    """Of the 120 words published, four have capitals, so that none is found, and two become themselves."""
    assert len(CONTRACTIONS) == 120 - 4 - 2
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"


def test_vqa_accuracy_leaves_each_answer_out_once():
    # n equal answers of ten: n times n - 1 are left, 10 - n times n are left, each counting min(1, left / 3)
    by_hand = {0: 0.0, 1: 9 / 30, 2: (2 * 1 + 8 * 2) / 30, 3: (3 * 2 + 7 * 3) / 30, 4: 1.0, 10: 1.0}
    for n, expected in by_hand.items():
        assert vqa_accuracy("Two.", ["2"] * n + ["x"] * (10 - n)) == pytest.approx(expected)


def short(*rows):
    return [Question(n, f"{n}.jpg", f"Why?\n{SHORT}", answers) for n, answers in enumerate(rows)]


def test_scores_of_short_answers():
    questions = short(("2",) * 10, ("red",) * 3 + ("blue",) * 7, ("man's",) * 10)
    assert score_benchmark("vqav2", questions, ["two", "red", " "]) == Score("vqav2", pytest.approx(1.9 / 3), 3, 1)
    assert score_benchmark("vizwiz", questions, ["two", "red", "men"]) == Score("vizwiz", pytest.approx(1.9 / 3), 3, 0)
    assert score_benchmark("textvqa", questions, ["two", None, "man's"]) == Score("textvqa", pytest.approx(2 / 3), 3, 1)
    assert score_benchmark("gqa", short(("left",), ("left",), ("no",)), ["Left.", "on the left", None]) == Score(
        "gqa", pytest.approx(1 / 3), 3, 1
    )


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B\t", "B"),
        ("B. a bus", "B"),
        ("B\nbecause", "B"),
        ("I think so. The answer is C.", "C"),
        ("The answer is A, or not. The answer is B.", "B"),
        ("The answer is B", "B"),
        ("B.", None),
        ("b", None),
        ("D", None),  # there are three
        ("a bus", None),
    ],
)
def test_scienceqas_letter(answer, letter):
    assert science_letter(answer, 3) == letter


def test_scienceqa_is_right_by_its_letter():
    questions = [Question(n, "x.png", "?", ("B",), options=("cat", "bus")) for n in range(4)]
    assert score_benchmark("sqa", questions, ["B", "A", "a bus", "B. a bus"]) == Score("sqa", 0.5, 4, 1)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("Well, the answer is A.", "A"),
        ("teddy", "A"),  # words of one option alone
        ("bear", None),  # words of two
        ("C", "C"),
        ("D", "A"),  # as published: no letter of three, but one option has a d
    ],
)
def test_mmbenchs_letter(answer, letter):
    assert choice_letter(answer, ("teddy bear", "brown bear", "ca")) == letter


@pytest.mark.parametrize(
    ("answer", "no"),
    [
        ("No", True),
        ("no, there is none", True),
        ("There is not a dog", True),
        ("Yes. There is no cat", False),  # the first sentence counts
        ("None", False),
        ("NO", False),  # as published: only No and no
        ("Nothing", False),
        ("I cannot see", False),
    ],
)
def test_popes_no(answer, no):
    assert says_no(answer) is no


def pope():
    rights = {"adversarial": ("yes", "yes", "no", "no"), "popular": ("yes", "no"), "random": ("yes", "no")}
    return [
        Question(n, "x.jpg", "Is there a dog in the image?", (right,), category)
        for n, (category, right) in enumerate((c, right) for c, rights_ in rights.items() for right in rights_)
    ]


def test_pope_is_the_mean_of_three_f1():
    said = ["Yes", "There is not", "It is", "no", "yes", "No", "no", "yes"]
    found = score_benchmark("pope", pope(), said)
    # adversarial: one hit, one miss, one false yes, one right no; popular all right; random all wrong
    assert (found.score, found.n, found.unanswered) == (pytest.approx((0.5 + 1 + 0) / 3), 8, 0)
    assert {key: found.details[f"adversarial/{key}"] for key in ("accuracy", "precision", "recall", "yes_ratio")} == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "yes_ratio": 0.5,
    }
    assert found.details["random/f1"] == found.details["random/accuracy"] == 0
    with pytest.raises(SanError, match="POPE has no category rare"):
        score_pope([replace(pope()[0], category="rare")], ["yes"])


def mmbench():
    one = Question(7, b"", f"What?\nA. cat\nB. dog\nC. bus\n{LETTER}", ("B",), options=("cat", "dog", "bus"))
    two = Question(8, b"", f"Why?\nA. x\nB. y\n{LETTER}", ("A",), options=("x", "y"))
    return [one, two]


def test_mmbench_turns_the_options_and_wants_all_to_be_right():
    questions = vqa_files.with_rotations(mmbench())
    assert [(q.id, q.options, q.answers) for q in questions] == [
        (7, ("cat", "dog", "bus"), ("B",)),
        (1_000_007, ("dog", "bus", "cat"), ("A",)),
        (2_000_007, ("bus", "cat", "dog"), ("C",)),
        (8, ("x", "y"), ("A",)),
        (1_000_008, ("y", "x"), ("B",)),
    ]
    assert questions[1].text == f"What?\nA. dog\nB. bus\nC. cat\n{LETTER}"
    assert vqa_files.with_rotations(questions) == questions
    assert score_benchmark("mmbench", questions, ["B", "dog", "c.", "A", "B"]).score == 1
    assert score_benchmark("mmbench", questions, ["B"] * 5).score == 0  # 7 and 1,000,008 alone are right
    assert score_benchmark("mmbench", questions, ["B", "A", "C", "A", None]) == Score("mmbench", 0.5, 2, 1, {"rows": 5})


def test_scores_that_cannot_be_are_explained():
    with pytest.raises(SanError, match=r"no benchmark 'vqa2'. Did you mean 'vqav2'\?"):
        score_benchmark("vqa2", short(("a",)), ["a"])
    with pytest.raises(SanError, match="There are 1 questions and 2 answers"):
        score_benchmark("gqa", short(("a",)), ["a", "b"])
    with pytest.raises(SanError, match="1 of 2 questions have no public answer, such as 1"):
        score_benchmark("vqav2", short(("a",), ()), ["a", "b"])
    with pytest.raises(SanError, match="ID 'x'"):
        score_benchmark("mmbench", [replace(mmbench()[0], id="x")], ["a"])


def test_each_benchmark_says_whether_its_split_is_the_papers():
    assert list(BENCHMARKS) == ["vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mmbench"]
    assert [name for name, one in BENCHMARKS.items() if not one.same] == ["vqav2", "vizwiz"]
    assert all((one.paper_split == one.local_split) == one.same for one in BENCHMARKS.values())


def test_the_command_of_lmms_eval(tmp_path):
    export = tmp_path / "my export"
    export.mkdir()
    with pytest.raises(SanError, match=r"config\.json"):
        lmms_command(export, "out")
    (export / "config.json").write_text('{"model_type": "llava"}')
    for content in (None, "no JSON", "[]", '{"run": "llava"}'):
        if content is not None:
            (export / "export.json").write_text(content)
        with pytest.raises(SanError, match=r"export\.json.*`san export RUN --merged"):
            lmms_command(export, "out")
    (export / "model.safetensors").write_bytes(b"weights")
    known = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    for other in ({}, {"model.safetensors": "0"}, {**known, "more.safetensors": "0"}):
        facts = {"run": "llava", "max_abs_difference": 1e-6, "weights_sha256": other}
        (export / "export.json").write_text(json.dumps(facts))
        with pytest.raises(SanError, match=r"mo\S+\.safetensors"):
            lmms_command(export, "out")
    (export / "export.json").write_text(json.dumps({**facts, "weights_sha256": known}))
    text = lmms_command(export, "out", processes=8)
    remarks = [line for line in text.splitlines() if line.startswith("#")]
    assert [remark.split(":")[0] for remark in remarks] == ["# vqav2", "# vizwiz", "# textvqa", "# pope", "# mmbench"]
    assert shlex.split(text.replace("\\\n", " "), comments=True) == [
        *"accelerate launch --num_processes=8 -m lmms_eval --model llava_hf --model_args".split(),
        f"pretrained={export}",
        "--tasks",
        "vqav2_val,gqa,vizwiz_vqa_val,scienceqa_img,textvqa_val,pope_full,mmbench_en_dev_static",
        *"--batch_size 1 --log_samples --output_path out".split(),
    ]
    assert "--tasks gqa,scienceqa_img " in lmms_command(export, "out", ["gqa", "sqa"])
    with pytest.raises(SanError, match="no benchmark 'sqaa'"):
        lmms_command(export, "out", ["sqaa"])
    (export / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SanError, match="type 'vit'"):
        lmms_command(export, "out")
    (export / "adapter_config.json").write_text("{}")
    with pytest.raises(SanError, match=r"config\.json"):
        lmms_command(export, "out")
    (export / "adapter_config.json").unlink()
    (export / "config.json").write_text('{"model_type": "llava"}')
    export.rename(tmp_path / "a,b")
    with pytest.raises(SanError, match="commas"):
        lmms_command(tmp_path / "a,b", "out")


def test_scoring_needs_no_torch():
    program = "import sys; from san_bench.vision_language.vqa import files, uploads; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
