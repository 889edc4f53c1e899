"""Fine-tune the language model of a small LLaVA with SAN on yes/no questions about images, then merge the adapter."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from san_bench.models.embedded import embedded_path
from san_bench.vision_language.mini.tasks import item, picture
from san_peft import SanConfig, merge_and_verify

TRAIN, TEST = range(96), range(500, 532)


def main() -> None:
    set_seed(0)
    processor = AutoProcessor.from_pretrained(embedded_path("llava"))
    processor.tokenizer.padding_side = "left"  # the answer is the next token of every row
    words = [processor.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in ("no", "yes")]

    def batch(numbers: range) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        items = [item("presence", number) for number in numbers]
        texts = [f"USER: <image>\n{one.text} ASSISTANT:" for one in items]
        pictures = [picture("presence", number) for number in numbers]
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        return dict(inputs), torch.tensor([one.answer == "yes" for one in items]).long()

    def answers(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs, logits_to_keep=1).logits[:, -1, words]  # logits of "no" and "yes"

    def accuracy() -> float:
        inputs, labels = batch(TEST)
        with torch.no_grad():
            return (answers(inputs).argmax(-1) == labels).float().mean().item()

    plain = AutoModelForImageTextToText.from_pretrained(embedded_path("llava"))
    config = SanConfig(target_modules=r".*language_model.*_proj", train_norms=True, exclude_modules=r".*vision_tower.*")
    model = get_peft_model(plain, config)
    model.print_trainable_parameters()
    before = accuracy()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.0)
    for start in TRAIN[::16]:
        inputs, labels = batch(range(start, start + 16))
        torch.nn.functional.cross_entropy(answers(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"accuracy on {len(TEST)} held-out questions: {before:.0%} before, {accuracy():.0%} after")
    print(merge_and_verify(model, batch(TEST)[0]))


if __name__ == "__main__":
    main()
