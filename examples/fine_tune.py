"""Fine-tune a small ViT on handwritten digits with SAN, then save, load and merge the adapter."""

from __future__ import annotations

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from san_bench.image.preprocess import for_checkpoint
from san_bench.image.tasks import load_task
from san_bench.models.embedded import embedded_path
from san_peft import SanConfig, merge_and_verify

STEPS = 20


def pretrained() -> torch.nn.Module:
    set_seed(0)
    return AutoModelForImageClassification.from_pretrained(embedded_path(), num_labels=10)


def main() -> None:
    task = load_task("digits")
    model = get_peft_model(pretrained(), SanConfig(train_norms=True, modules_to_save=["classifier"]))
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            learning_rate=0.03,
            per_device_train_batch_size=32,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(model, arguments, train_dataset=for_checkpoint(task["train800"], embedded_path())).train()
        model.cpu().save_pretrained(folder)
        loaded = PeftModel.from_pretrained(pretrained(), folder).eval()
    images = for_checkpoint(task["val200"], embedded_path()).batch(200)
    labels = torch.from_numpy(task["val200"].labels)
    with torch.no_grad():
        logits = loaded(images).logits
        print("loaded equals trained:", torch.equal(logits, model.eval()(images).logits))
    report = merge_and_verify(loaded, {"pixel_values": images})
    correct = int((report.model(images).logits.argmax(-1) == labels).sum())
    print(f"merged: {correct} of {len(labels)} validation images correct after {STEPS} steps")
    print(f"merging changed the logits by at most {report.max_abs_difference:.1e}")


if __name__ == "__main__":
    main()
