"""Teach the small LLaVA to answer yes or no about pictures with SAN on its language model, then merge with proof."""

from __future__ import annotations

import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from san_bench.models.embedded import embedded_path
from san_bench.vision_language.mini.tasks import item, picture
from san_peft import SanConfig, merge_and_verify

TRAINED, ASKED = range(96), range(500, 532)


def main() -> None:
    set_seed(0)
    processor = AutoProcessor.from_pretrained(embedded_path("llava"))
    processor.tokenizer.padding_side = "left"  # so that the answer comes next in every row
    words = [processor.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in ("no", "yes")]

    def batch(numbers: range) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        asked = [item("presence", number) for number in numbers]
        texts = [f"USER: <image>\n{one.text} ASSISTANT:" for one in asked]
        pictures = [picture("presence", number) for number in numbers]
        read = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        return dict(read), torch.tensor([one.answer == "yes" for one in asked]).long()

    def answers(read: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**read, logits_to_keep=1).logits[:, -1, words]  # of "no" and "yes"

    def accuracy() -> float:
        read, right = batch(ASKED)
        with torch.no_grad():
            return (answers(read).argmax(-1) == right).float().mean().item()

    plain = AutoModelForImageTextToText.from_pretrained(embedded_path("llava"))
    config = SanConfig(target_modules=r".*language_model.*_proj", train_norms=True, exclude_modules=r".*vision_tower.*")
    model = get_peft_model(plain, config)
    model.print_trainable_parameters()
    before = accuracy()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.0)
    for start in TRAINED[::16]:
        read, right = batch(range(start, start + 16))
        torch.nn.functional.cross_entropy(answers(read), right).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"right of {len(ASKED)} questions: {before:.0%} before, {accuracy():.0%} after")
    print(merge_and_verify(model, batch(ASKED)[0]))


if __name__ == "__main__":
    main()
