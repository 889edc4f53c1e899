"""The really pretrained models as tests use them, with a little real text or a few real photos to learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor, nn

from san_bench.image.preprocess import checkpoint_input
from san_bench.models.real import install_command, missing, real_path

SENTENCES = (
    ("The library is open from nine in the morning until six in the evening.", 0),
    ("What a wonderful film, warm, clever and beautifully played.", 1),
    ("Books have to be returned to the desk within three weeks.", 0),
    ("I loved every minute of it, the music most of all.", 1),
    ("The train to the coast leaves from platform four at noon.", 0),
    ("A joy from beginning to end; I laughed until I cried.", 1),
    ("Please switch off the lights when you leave the room.", 0),
    ("The best meal that we have had in years, and such kind people.", 1),
)
"""Notices, and praise."""

REACTIONS = (
    "CC(=O)O.OCC>>CC(=O)OCC",
    "O=C(O)c1ccccc1.CN>>CNC(=O)c1ccccc1",
    "CC(C)S.CN(C)C=O.Fc1cccnc1F>>CC(C)Sc1ncccc1F",
    "CCO.CC(=O)Cl>>CCOC(C)=O",
)


@cache
def folder(name: str) -> Path:
    """The folder of a model; where a package is missing, the test is skipped with the command that installs it."""
    if missing(name):
        pytest.skip(f"real/{name} is not installed: {install_command(name)}")
    return real_path(name)


def photos(side: int, **settings: Any) -> Tensor:
    """Eight crops of two photos, of a temple and of a flower in turn, as a model reads them."""
    from sklearn.datasets import load_sample_images

    crops = []
    for left in (0, 70, 140, 210):
        for image in load_sample_images().images:
            crop = Image.fromarray(image).crop((left, left // 3, left + 400, left // 3 + 400)).resize((side, side), 3)
            crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255)
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("mean", "std"))
    return (torch.stack(crops) - mean) / std


def tokens(name: str, texts: tuple[str, ...], length: int) -> dict[str, Tensor]:
    """The beginnings of texts, all of one length."""
    tokenizer = tf.AutoTokenizer.from_pretrained(folder(name))
    rows = [tokenizer(text)["input_ids"][:length] for text in texts]
    return {"input_ids": torch.tensor([row for row in rows if len(row) == length])}


def spoken(name: str) -> dict[str, Tensor]:
    batch = tokens(name, tuple(text for text, _ in SENTENCES), 9)
    return {**batch, "labels": batch["input_ids"]}


def judged(name: str) -> dict[str, Tensor]:
    batch = tokens(name, tuple(text for text, _ in SENTENCES), 10)
    assert len(batch["input_ids"]) == len(SENTENCES)
    return {**batch, "labels": torch.tensor([label for _, label in SENTENCES])}


def masked(name: str) -> dict[str, Tensor]:
    batch = tokens(name, REACTIONS, 22)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 3::4] = batch["input_ids"][:, 3::4]
    mask = tf.AutoTokenizer.from_pretrained(folder(name)).mask_token_id
    return {"input_ids": batch["input_ids"].masked_fill(labels >= 0, mask), "labels": labels}


def seen(side: int) -> Callable[[str], dict[str, Tensor]]:
    def batch(name: str) -> dict[str, Tensor]:
        settings = checkpoint_input(folder(name))
        pixels = photos(side, mean=settings.mean, std=settings.std)
        return {"pixel_values": pixels, "labels": torch.arange(len(pixels)) % 2}

    return batch


@dataclass(frozen=True)
class Real:
    """How a model is used in tests.

    Attributes:
        auto: What loads it for the task that it is trained on.
        batch: Its inputs, with labels.
        edges: How many edges the trace of the model as it was pretrained has, and how many barriers.
        lr: Learning rate of its own scales.
        hosted: Layers that LoRA and DoRA adapt; by default those of SAN.
        options: Of the configuration.
        loading: Of `from_pretrained`.
    """

    auto: Any
    batch: Callable[[str], dict[str, Tensor]]
    edges: tuple[int, int]
    lr: float
    hosted: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """The model in eval mode; what is new in it is the same every time."""
        torch.manual_seed(0)
        return self.auto.from_pretrained(folder(name), dtype=dtype, **self.loading).eval()

    def inputs(self, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A batch with images in a type of numbers; half precision, slow on many CPUs, gets two samples."""
        batch = self.batch(name)
        if dtype != torch.float32:
            batch = {key: value[:2] for key, value in batch.items()}
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


HEAD = {"modules_to_save": ["classifier"]}
TWO = {"num_labels": 2}

MODELS = {
    "smollm2": Real(tf.AutoModelForCausalLM, spoken, (208, 0), 5e-3, options={"task_type": "CAUSAL_LM"}),
    "dinov2-small": Real(tf.AutoModelForImageClassification, seen(98), (73, 0), 5e-3, options=HEAD, loading=TWO),
    "minilm": Real(tf.AutoModelForSequenceClassification, judged, (34, 0), 5e-3, options=HEAD, loading=TWO),
    "efficientnet-lite0": Real(
        tf.AutoModelForImageClassification,
        seen(64),
        (49, 0),
        5e-3,
        hosted=["conv_pw", "conv_pwl", "conv_head"],
        options={"modules_to_save": ["timm_model.classifier"]},
        loading={**TWO, "ignore_mismatched_sizes": True},
    ),
    "rxn-albert": Real(tf.AutoModelForMaskedLM, masked, (5, 3), 5e-3),
}

SMALL = ("efficientnet-lite0", "rxn-albert")
"""Models that `make real-small` installs and tests."""


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits in eval mode, without labels."""
    training = model.training
    with torch.no_grad():
        found = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits
    model.train(training)
    return found
