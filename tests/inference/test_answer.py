"""Questions and pictures in, answers out: the same text as stock transformers generates from the same directory."""

import json
import re

from examples.quickstart import caption, draw, make_model
from megamm.inference.answer import Answerer, Question
from megamm.parallel.launch import RankPool
from megamm.testing.tiny import tiny_llava


def own(model_dir, paths):
    questions = [Question(text=f"<image>\n{draw.QUESTION}", images=[path.read_bytes()]) for path in paths]
    return list(Answerer(model_dir, "llava")(questions, max_new_tokens=24, batch_size=4))


def test_answers_are_those_of_transformers(tmp_path):
    draw.draw(tmp_path / "data", num_train=40, num_heldout=8, seed=0)
    tiny_llava(tmp_path / "hf", texts=make_model.texts(tmp_path / "data/train.json"), seed=3)
    samples = json.loads((tmp_path / "data/heldout.json").read_text())
    paths = [tmp_path / "data/images" / sample["image"] for sample in samples]
    with RankPool(1) as pool:  # a process of its own: the model parallel groups are global
        (ours,) = pool.run(own, tmp_path / "hf", paths, ranks=1)
    theirs = caption.captions(tmp_path / "hf", paths, draw.QUESTION, batch_size=8)
    assert len(set(theirs)) > 1
    for mine, said in zip(ours, theirs, strict=True):
        # transformers leaves special tokens out of the text, and a random model says them
        assert re.sub("<(image|s|unk|pad)>", "", mine).strip() == said
