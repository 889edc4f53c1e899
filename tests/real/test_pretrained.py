"""Each model knows what it was trained for: the conversion of its weights is right."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from tests.real.models import REACTIONS, folder, photos

from san_bench.image.preprocess import checkpoint_input

pytestmark = pytest.mark.real


@torch.no_grad()
def test_smollm2_knows_words_from_their_shuffle():
    model = tf.AutoModelForCausalLM.from_pretrained(folder("smollm2")).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder("smollm2"))
    text = "Visitors who wish to borrow a book must show their card at the desk, and return it within three weeks."
    words = text.split()
    shuffled = " ".join(words[i] for i in torch.randperm(len(words)).tolist())
    known, strange = (
        math.exp(model(ids, labels=ids).loss.item())
        for ids in (tokenizer(some, return_tensors="pt")["input_ids"] for some in (text, shuffled))
    )
    assert known < 100 < strange / 5
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Name a fruit."}], tokenize=False)
    assert "<|im_start|>user\nName a fruit.<|im_end|>" in chat


@torch.no_grad()
def test_minilm_knows_paraphrases():
    model = tf.AutoModel.from_pretrained(folder("minilm")).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder("minilm"))
    texts = ["The cat sleeps on the sofa.", "A kitten is napping on the couch.", "Interest rates rose again in May."]
    states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0] for text in texts]
    first, second, third = (state / state.norm() for state in states)
    assert first @ second > 0.5
    assert first @ third < 0.2


@torch.no_grad()
def test_rxn_albert_fills_in_atoms():
    model = tf.AutoModelForMaskedLM.from_pretrained(folder("rxn-albert")).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder("rxn-albert"))
    assert tokenizer.tokenize("CC(=O)Cl>>[NH4+]") == ["C", "C", "(", "=", "O", ")", "Cl", ">>", "[NH4+]"]
    right = count = 0
    for reaction in REACTIONS:
        ids = tokenizer(reaction, return_tensors="pt")["input_ids"]
        assert tokenizer.unk_token_id not in ids
        places = torch.arange(1, ids.shape[1] - 1)
        asked = ids.repeat(len(places), 1)
        asked[torch.arange(len(places)), places] = tokenizer.mask_token_id
        best = model(asked).logits[torch.arange(len(places)), places].argmax(-1)
        right, count = right + int((best == ids[0, places]).sum()), count + len(places)
    assert right > 0.8 * count


@torch.no_grad()
def test_efficientnet_lite0_names_what_it_sees():
    timm = pytest.importorskip("timm")
    model = timm.create_model(f"local-dir:{folder('efficientnet-lite0')}", pretrained=True).eval()
    settings = checkpoint_input(folder("efficientnet-lite0"))
    assert settings.mean == settings.std == (0.5, 0.5, 0.5)
    names = timm.data.ImageNetInfo()
    seen = model(photos(224, mean=settings.mean, std=settings.std)[:2]).argmax(-1).tolist()
    temple, flower = (names.index_to_description(number).split(",")[0] for number in seen)
    assert (temple, flower) == ("palace", "daisy")


@torch.no_grad()
def test_dinov2_agrees_with_the_onnx_file():
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from san_bench.models.real import weights_of

    model = tf.AutoModel.from_pretrained(folder("dinov2-small")).eval()
    settings = checkpoint_input(folder("dinov2-small"))
    graph = onnx.load(str(weights_of("dinov2-small")))
    name = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    pixels = photos(224, mean=settings.mean, std=settings.std)[:1]
    (theirs,) = session.run([name], {session.get_inputs()[0].name: pixels.numpy()})
    torch.testing.assert_close(model(pixels).last_hidden_state, torch.from_numpy(theirs), rtol=1e-3, atol=1e-3)
