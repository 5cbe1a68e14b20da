"""Caption the held-out pictures with an exported model, and count the wholly right captions.

In stock transformers; with --family in megamm itself, for the families that no class of transformers can hold.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar


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


def own_captions(model_dir: Path, family: str, image_paths: list[Path], question: str, batch_size: int) -> list[str]:
    """The same by megamm, which reads the export in its authors' layout."""
    from megamm.inference.answer import Answerer, Question
    from megamm.registry import family as find_family
    from megamm.testing.families import TINY

    text = f"{find_family(family).marker}\n{question}"
    questions = [Question(text=text, images=[path.read_bytes()]) for path in image_paths]
    return list(Answerer(model_dir, family, TINY[family].template)(questions, 24, batch_size))


def results(samples: list[dict], said: list[str], image_dir: Path) -> list[dict]:
    """One entry per held-out picture: what it shows, what was said, and whether these are the same to the letter."""
    entries = []
    for sample, text in zip(samples, said, strict=True):
        expected = sample["conversations"][1]["value"]
        image = str(image_dir / sample["image"])
        entries.append(
            {"image": image, "expected": expected, "said": text, "right": text == expected, "unseen": sample["unseen"]}
        )
    return entries


def summary(entries: list[dict]) -> str:
    """The shares of wholly right captions, a line each."""
    groups = {
        "all": entries,
        "things trained on": [entry for entry in entries if not entry["unseen"]],
        "things never trained on": [entry for entry in entries if entry["unseen"]],
    }
    right = {name: sum(entry["right"] for entry in group) for name, group in groups.items()}
    return "\n".join(
        f"wholly right, {name}: {right[name]} of {len(group)} ({right[name] / len(group):.1%})"
        for name, group in groups.items()
    )


def main(model_dir: Path, family: str | None, data: Path, output: Path, batch_size: int) -> None:
    """Caption all of DATA/heldout.json, write the results as JSON and print the summary."""
    samples = json.loads((data / "heldout.json").read_text())
    image_dir = data / "images"
    question = samples[0]["conversations"][0]["value"].removeprefix("<image>\n")
    paths = [image_dir / sample["image"] for sample in samples]
    if family is None:
        said = captions(model_dir, paths, question, batch_size)
    else:
        said = own_captions(model_dir, family, paths, question, batch_size)
    entries = results(samples, said, image_dir)
    aside = output.with_suffix(".partial")
    aside.write_text(json.dumps(entries, indent=1) + "\n")
    aside.replace(output)
    print(summary(entries))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/export"))
    parser.add_argument("--family", help="caption in megamm, with a model of this family")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/captions.json"))
    parser.add_argument("--batch-size", type=int, default=40)
    options = parser.parse_args()
    for path in (options.model / "config.json", options.data / "heldout.json"):
        if not path.is_file():  # transformers would look for the model on the network
            parser.error(f"{path}: no such file; give --model an export and --data what draw.py drew")
    disable_progress_bar()
    main(options.model, options.family, options.data, options.output, options.batch_size)
