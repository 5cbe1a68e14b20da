"""Caption the held-out pictures with an exported model, in stock transformers, and count the wholly right captions."""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.inference_mode()
def captions(model_dir: Path, image_paths: list[Path], question: str, batch_size: int) -> list[str]:
    """What the model says about each picture, greedily; the prompt is the chat template of the export."""
    processor = AutoProcessor.from_pretrained(model_dir)
    model = AutoModelForImageTextToText.from_pretrained(model_dir).eval()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    said: list[str] = []
    for begin in range(0, len(image_paths), batch_size):
        images = [Image.open(path).convert("RGB") for path in image_paths[begin : begin + batch_size]]
        inputs = processor(text=[prompt] * len(images), images=images, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
        answers = output[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]
    return said


def caption_heldout(model_dir: Path, data: Path, output: Path, batch_size: int) -> None:
    """Write one JSON entry per picture of DATA/heldout.json, and print how many captions are wholly right."""
    samples = json.loads((data / "heldout.json").read_text())
    question = samples[0]["conversations"][0]["value"].removeprefix("<image>\n")
    images = [data / "images" / sample["image"] for sample in samples]
    started = time.perf_counter()
    said = captions(model_dir, images, question, batch_size)
    results = [
        {
            "image": str(image),
            "expected": sample["conversations"][1]["value"],
            "said": text,
            "right": text == sample["conversations"][1]["value"],
            "unseen": sample["unseen"],
        }
        for sample, image, text in zip(samples, images, said, strict=True)
    ]
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"captioned {len(results)} held-out pictures in {time.perf_counter() - started:.0f} s, loading included")
    for name, group in (
        ("all", results),
        ("things trained on", [result for result in results if not result["unseen"]]),
        ("things never trained on", [result for result in results if result["unseen"]]),
    ):
        right = sum(result["right"] for result in group)
        print(f"wholly right, {name}: {right} of {len(group)} ({right / len(group):.1%})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/export"))
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/captions.json"))
    parser.add_argument("--batch-size", type=int, default=40)
    options = parser.parse_args()
    caption_heldout(options.model, options.data, options.output, options.batch_size)
