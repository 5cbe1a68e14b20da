"""Draw captioned pictures: one shape of one colour at one of nine places, 216 captions. Some are never trained on.

Writes OUTPUT/train.json and OUTPUT/heldout.json (LLaVA conversations) and OUTPUT/images/. The same seed draws the same.
"""

import argparse
import json
import random
import shutil
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 230),
    "orange": (245, 130, 20),
    "purple": (150, 60, 180),
    "black": (20, 20, 20),
}
SHAPES = ("ring", "square", "triangle", "cross")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
"""Row by row, cells of a 3 x 3 grid."""

QUESTION = "What is in the picture?"
SIZE = 96
"""Side of a picture in pixels."""
FINE = 4
"""Drawn so many times larger, then scaled down: smooth edges."""

Thing = tuple[str, str, str]
"""Colour, shape, place."""

THINGS: list[Thing] = list(product(COLOURS, SHAPES, PLACES))
UNSEEN: set[Thing] = {
    (colour, shape, place)
    for (i, colour), (j, shape), (k, place) in product(enumerate(COLOURS), enumerate(SHAPES), enumerate(PLACES))
    if (i + 2 * j + 3 * k) % 12 == 0
}
"""Never drawn for training, though each colour, shape and place is, in other company."""


def caption(thing: Thing) -> str:
    """What the picture shows, as the model must say it."""
    colour, shape, place = thing
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} at the {place}"


def picture(thing: Thing, rng: random.Random) -> Image.Image:
    """RGB, SIZE x SIZE. Size, exact place, colour and background vary, so no two pictures are the same."""
    colour, shape, place = thing
    grey = rng.randint(200, 240)
    image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), tuple(grey + rng.randint(-12, 12) for _ in range(3)))
    row, column = divmod(PLACES.index(place), 3)
    cell = SIZE * FINE / 3
    x, y = ((index + 0.5 + rng.uniform(-0.08, 0.08)) * cell for index in (column, row))
    r = rng.uniform(0.3, 0.44) * cell
    fill = tuple(max(0, min(255, value + rng.randint(-15, 15))) for value in COLOURS[colour])
    pen = ImageDraw.Draw(image)
    if shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(0.45 * r))
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    else:
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw(output: Path, num_train: int, num_heldout: int, seed: int) -> None:
    """Draw both sets. A quarter of the held-out pictures shows things of UNSEEN, the others things trained on.

    Raises SystemExit where `output` exists; it appears only when all is drawn.
    """
    if output.exists():
        raise SystemExit(f"error: {output} exists already; remove it or name another --output")
    aside = output.with_name(output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "images").mkdir(parents=True)
    rng = random.Random(seed)
    seen, unseen = [thing for thing in THINGS if thing not in UNSEEN], sorted(UNSEEN)
    num_unseen = num_heldout // 4
    sets = {
        "train": [rng.choice(seen) for _ in range(num_train)],
        "heldout": [rng.choice(unseen) for _ in range(num_unseen)]
        + [rng.choice(seen) for _ in range(num_heldout - num_unseen)],
    }
    for name, things in sets.items():
        samples = []
        for i, thing in enumerate(things):
            file = f"{name}-{i:05}.jpg"
            picture(thing, rng).save(aside / "images" / file, quality=95)
            samples.append(
                {
                    "id": f"{name}-{i:05}",
                    "image": file,
                    "unseen": thing in UNSEEN,
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{QUESTION}"},
                        {"from": "gpt", "value": caption(thing)},
                    ],
                }
            )
        (aside / f"{name}.json").write_text(json.dumps(samples, indent=1) + "\n")
    aside.rename(output)
    print(f"{output}: {num_train} pictures to train on, {num_heldout} held out, {num_unseen} of these of unseen things")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-heldout", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw(options.output, options.num_train, options.num_heldout, options.seed)
