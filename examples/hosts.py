"""Train SAN over LoRA, save and load the adapter, save the closest plain LoRA, merge, and detach SAN."""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from san_bench.image.preprocess import for_checkpoint
from san_bench.image.tasks import load_task
from san_bench.models.embedded import embedded_path
from san_peft import SanConfig, detach_san, merge_and_verify, save_as_lora

STEPS = 12


def pretrained() -> torch.nn.Module:
    set_seed(0)
    return AutoModelForImageClassification.from_pretrained(embedded_path(), num_labels=10)


def main() -> None:
    task = load_task("digits")
    lora = LoraConfig(r=4, target_modules=["v_proj", "fc1", "fc2"], modules_to_save=["classifier"])
    model = get_peft_model(pretrained(), SanConfig(inner=lora))
    model.print_trainable_parameters()  # those of LoRA; SAN adds none
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, learning_rate=0.003, per_device_train_batch_size=32, report_to=[], use_cpu=True
        )
        Trainer(model, arguments, train_dataset=for_checkpoint(task["train800"], embedded_path())).train()
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(pretrained(), folder).eval()
        images = for_checkpoint(task["val200"], embedded_path()).batch(200)
        with torch.no_grad():
            print("loaded equals trained:", torch.equal(loaded(images).logits, model.eval()(images).logits))
        fc1 = loaded.base_model.model.vit.layers[0].mlp.fc1
        print(f"scales of the first fc1: {fc1.get_scale().min():.3f} to {fc1.get_scale().max():.3f}")
        for rank in (4, 16):
            lost = save_as_lora(loaded, f"{folder}/lora", rank).error
            print(f"closest LoRA of rank {rank}: relative error {lost:.0%}")
    report = merge_and_verify(loaded, {"pixel_values": images})
    print(f"merging changes the logits by at most {report.max_abs_difference:.1e}")
    print("without SAN the tuner is a", type(detach_san(model).base_model).__name__)


if __name__ == "__main__":
    main()
