"""What a model answers: generated in batches, read as published, and chosen by likelihood."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from tests.bench.texts import PAD, TASKS, gpt2, llama, llama2, llama3, record

from san_bench.language import generation as module
from san_bench.language.commonsense import find_task
from san_bench.language.generation import answer_task, generate_texts, response
from san_bench.language.instructions import Instruction, Questions
from san_bench.language.likelihood import choose, harness_scores, log_likelihoods, read_harness
from san_bench.language.prompts import Collator, prompt, tokenise
from san_bench.language.tokenizer import prepare_tokenizer
from san_peft import SanConfig
from san_peft.errors import SanError

RECORDS = [record(task) for task in TASKS]
PROMPTS = [prompt(one, "legacy", "evaluation") for one in RECORDS]


def questions(task, records):
    """Records as questions of a task, with what is sought in answers to it."""
    facts = find_task(task)[1]
    return Questions(tuple(records), facts.answers, facts.sought)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ready():
    return prepare_tokenizer(llama2())


@pytest.fixture(scope="module")
def model(ready):
    return llama(len(ready.tokenizer))


# Generation


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("pad", ["unk", "eos"])  # a mask could be guessed from the one, but not from the other
def test_a_text_does_not_depend_on_what_it_is_generated_with(make, beams, pad):
    ready = prepare_tokenizer(llama2(), pad)
    model = make(len(ready.tokenizer))
    assert len({len(ready.encode(text)) for text in PROMPTS}) > 5
    alone = generate_texts(model, ready, PROMPTS, 1, beams, 12)
    assert len(set(alone)) > 5
    for size in (3, 8):
        assert generate_texts(model, ready, PROMPTS, size, beams, 12) == alone


def test_the_texts_are_what_the_model_itself_goes_on_with(ready, model):
    tokens = ready.encode(PROMPTS[0])
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert ready.eos not in tokens
    (text,) = generate_texts(model, ready, PROMPTS[:1], 1, 1, 6)
    assert text == ready.decode(tokens[-6:])


def test_an_adapter_answers_as_its_merged_model_does(ready):
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(llama(len(ready.tokenizer)), SanConfig(target_modules=targets, task_type="CAUSAL_LM"))
    plain = generate_texts(adapted, ready, PROMPTS, 8, 4, 6)
    with torch.no_grad():
        for name, scale in adapted.named_parameters():
            if "san_scale" in name:
                scale.uniform_(0.5, 1.5)
    texts = generate_texts(adapted, ready, PROMPTS, 1, 4, 6)
    assert texts != plain
    assert generate_texts(adapted, ready, PROMPTS, 8, 4, 6) == texts
    assert generate_texts(adapted.merge_and_unload(), ready, PROMPTS, 3, 4, 6) == texts


def test_a_beam_finds_what_is_likelier(ready, model):
    greedy, beam = (generate_texts(model, ready, PROMPTS[:3], 3, beams, 8) for beams in (1, 4))
    assert greedy != beam
    score = [
        sum(log_likelihoods(model, ready, list(zip(PROMPTS[:3], texts, strict=True)), 3)) for texts in (greedy, beam)
    ]
    assert score[1] > score[0]


def test_generation_stops_at_every_end_and_ignores_what_the_checkpoint_would_sample():
    tokenizer = llama3(PAD)
    ready = prepare_tokenizer(tokenizer)
    model = llama(len(tokenizer))
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.6
    (plain,) = generate_texts(model, ready, PROMPTS[:1], 1, 1, 8)
    assert generate_texts(model, ready, PROMPTS[:1], 1, 1, 8) == [plain]
    written = model.generate(torch.tensor([ready.encode(PROMPTS[0])]), max_new_tokens=8, do_sample=False)[
        0, -8:
    ].tolist()
    third = written[2]
    assert third not in written[:2]
    (text,) = generate_texts(model, replace(ready, stops=(ready.eos, third)), PROMPTS[:1], 1, 1, 8)
    assert text == ready.decode(written[:3])


def test_the_model_is_left_as_it_was(ready, model):
    model.train()
    try:
        generate_texts(model, ready, PROMPTS[:1], 1, 1, 2)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("what", ["batch_size", "beams", "max_new_tokens"])
def test_a_number_below_one_is_an_error(ready, model, what):
    with pytest.raises(SanError, match=f"{what} is 0, but must be 1 or more"):
        generate_texts(model, ready, PROMPTS, **{"batch_size": 1, what: 0})


# Scoring


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  the correct answer is true\n", "the correct answer is true"),
        ("false\n\n### Response:\n  true ### Response: neither", "neither"),
    ],
)
def test_what_follows_the_last_header_counts(text, expected):
    assert response(text) == expected


def test_the_published_protocol_by_hand(ready, monkeypatch):
    records = [replace(record("social_i_qa"), answer=f"answer{n}") for n in (1, 2, 3, 1, 2)]
    texts = [
        " the correct answer is answer1",
        "answer3 answer2",  # the first counts
        "false ### Response: answer3",  # what follows the header
        "Answer1",  # case counts
        "answer5 or answer2",  # sought, so found, though no choice
    ]
    asked = []
    monkeypatch.setattr(module, "generate_texts", lambda *given: asked.append(given) or texts)
    result = answer_task(None, ready, "SIQA", questions("social_i_qa", records), "legacy", 8)
    assert asked[0][2:] == ([prompt(one, "legacy", "evaluation") for one in records], 8, 4, 32)
    assert (result.accuracy, result.correct, result.n, result.unanswered) == (0.4, 2, 5, 1)
    assert [row["predicted"] for row in result.rows] == ["answer1", "answer3", "answer3", None, "answer5"]
    assert result.rows[2] == {
        "index": 2,
        "instruction": records[2].instruction,
        "answer": "answer3",
        "generated": texts[2],
        "predicted": "answer3",
        "correct": True,
    }
    with pytest.raises(SanError, match="no questions of boolq"):
        answer_task(None, ready, "boolq", questions("boolq", []), "legacy", 8)


def test_a_model_that_learnt_the_answers_is_scored_right(ready):
    model = llama(len(ready.tokenizer))
    model.train()
    batch = Collator(ready.pad, "left")(tokenise(RECORDS, ready, "clean", "answer").examples)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss < 0.05
    for task, one in zip(TASKS, RECORDS, strict=True):
        result = answer_task(model, ready, task, questions(task, [one]), "clean", 4)
        assert (result.rows[0]["generated"], result.accuracy) == (one.output, 1.0)  # it ends by itself
    answers = ("answer1", "answer2", "answer3", "answer4", "answer5")
    asked = Questions((record("ARC-Easy"), record("openbookqa")), answers, answers)
    chosen = choose(model, ready, asked, "clean", 4)
    assert (chosen.accuracy, chosen.n) == (1.0, 2)


# Likelihood


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_likelihood_of_a_text_by_hand(ready, make):
    model = make(len(ready.tokenizer))
    pairs = [(text, one.output) for text, one in zip(PROMPTS, RECORDS, strict=True)]
    expected = []
    for before, after in pairs:
        tokens, start = ready.encode_after(before, after)
        total = 0.0
        for place in range(start, len(tokens)):
            with torch.no_grad():
                logits = model(torch.tensor([tokens[:place]])).logits[0, -1].double()
            total += float(logits[tokens[place]] - logits.exp().sum().log())
        expected.append(total)
    for size in (1, 3, 8):
        assert log_likelihoods(model, ready, pairs, size) == pytest.approx(expected, rel=1e-4)


def test_the_likeliest_answer_is_chosen_in_every_batch_size(ready, model):
    records, choices = [record("ARC-Easy"), record("social_i_qa")], ("answer1", "answer2", "answer5")
    results = [choose(model, ready, Questions(tuple(records), choices, choices), "clean", size) for size in (1, 3, 8)]
    assert [[row["predicted"] for row in one.rows] for one in results[1:]] == [
        [row["predicted"] for row in results[0].rows]
    ] * 2
    for one, row in zip(records, results[0].rows, strict=True):
        text = prompt(one, "clean", "evaluation")
        own = [log_likelihoods(model, ready, [(text, f"the correct answer is {c}")], 1)[0] for c in choices]
        assert list(row["log_likelihoods"].values()) == pytest.approx(own, rel=1e-5)
        assert row["predicted"] == choices[own.index(max(own))]
        assert row["correct"] == (row["predicted"] == one.answer)
    assert results[0].correct == sum(row["correct"] for row in results[0].rows)


def test_a_record_without_its_answer_cannot_be_chosen_for(ready, model):
    asked = questions("boolq", [record("boolq"), Instruction("a", "", "I do not know", "true"), record("piqa")])
    with pytest.raises(
        SanError, match=r"2 of 3 records have no answer to choose from, such as index 1, 2: .* true, false"
    ):
        choose(model, ready, asked, "clean", 1)
    with pytest.raises(SanError, match="There are no questions"):
        choose(model, ready, questions("boolq", []), "clean", 1)
    with pytest.raises(SanError, match=r"The text '' after .* has no tokens"):
        log_likelihoods(model, ready, [("a", "")], 1)


# lm-eval


def test_results_of_lm_eval_get_our_names():
    output = {
        "results": {
            "social_iqa": {"alias": "social_iqa", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "piqa": {"acc,none": 0.5},
            "arc_easy": {
                "acc,none": 0.25,
                "acc_stderr,none": 0.1,
                "acc_norm,none": 0.75,
                "acc_norm_stderr,none": "N/A",
            },
        },
        "n-samples": {"social_iqa": {"original": 9, "effective": 4}, "arc_easy": {"original": 8, "effective": 8}},
    }
    assert read_harness(output, ["siqa", "ARC-Easy"]) == {
        "social_i_qa": {"acc": 0.5, "acc_stderr": 0.1, "n": 4},
        "ARC-Easy": {"acc": 0.25, "acc_stderr": 0.1, "acc_norm": 0.75, "n": 8},
    }
    with pytest.raises(SanError, match=r"boolq, piqa.*social_iqa, piqa"):
        read_harness(output, ["boolq", "siqa", "piqa"])


def test_lm_eval_is_asked_for_where_it_is_missing(ready, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SanError, match=r'lm-eval needs lm_eval, which is missing: pip install "san-peft\[language\]"'):
        harness_scores(model, ready)


def test_lm_eval_gets_the_model_in_memory_and_its_own_names(ready, model, monkeypatch):
    made = []
    output = {
        "results": {"boolq": {"acc,none": 0.5}, "social_iqa": {"acc,none": 0.25}},
        "n-samples": {name: {"original": 9, "effective": 2} for name in ("boolq", "social_iqa")},
    }
    harness = SimpleNamespace(simple_evaluate=lambda **given: made.append(given) or output)
    wrapper = SimpleNamespace(HFLM=lambda **given: made.append(given) or "wrapped")
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", wrapper)
    scores = harness_scores(model, ready, ("boolq", "siqa"), batch_size=4, limit=2)
    assert scores == {"boolq": {"acc": 0.5, "n": 2}, "social_i_qa": {"acc": 0.25, "n": 2}}
    assert made[0] == {"pretrained": model, "tokenizer": ready.tokenizer, "batch_size": 4, "add_bos_token": True}
    assert made[1] == {"model": "wrapped", "tasks": ["boolq", "social_iqa"], "num_fewshot": 0, "limit": 2}


def test_lm_eval_knows_the_tasks_and_scores_as_we_do(ready, model):
    pytest.importorskip("lm_eval")
    tasks = importlib.import_module("lm_eval.tasks").TaskManager().all_tasks
    names = ["boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert set(names) <= set(tasks)
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    request = importlib.import_module("lm_eval.api.instance").Instance
    wrapped = wrapper(pretrained=model, tokenizer=ready.tokenizer, batch_size=2, add_bos_token=True)
    pairs = [(text.rstrip(), f" {one.answer}") for text, one in zip(PROMPTS, RECORDS, strict=True)]
    asked = [request("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    assert [score for score, _ in wrapped.loglikelihood(asked)] == pytest.approx(
        log_likelihoods(model, ready, pairs, 2), rel=1e-3
    )
