"""Tied embeddings, with llm.embed and llm.head on any stages: transformers is the reference."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from megamm.config.schema import Parallel
from megamm.verify import Request, compare, verify
from tests.training import jobs
from tests.training.test_layouts import assert_same, at, config  # noqa: F401 - a fixture

PLACES = {
    "one stage holds both": dict(),
    "tp2 sp": dict(tp=2, sequence_parallel=True),
    "first and last stage": dict(pp=2, layout="VvvvPEt|ttL"),
    "both behind the tower": dict(pp=2, layout="VvvvP|EtttL"),
    "second and fourth stage": dict(pp=4, layout="Vvv|vPE|tt|tL"),
    "two virtual stages of one rank": dict(pp=2, layout="Vvvv|PEt|tt|L"),
    "tp2 and two virtual stages": dict(tp=2, pp=2, layout="Vvvv|PEt|tt|L", sequence_parallel=True),
}


@pytest.fixture(scope="module")
def tied(golden, tmp_path_factory):
    """A tied model in Hugging Face format, a case made by running it, and its gradient norms."""
    directory = tmp_path_factory.mktemp("tied")
    fields = json.loads((golden / "llava/hf_native/hf/config.json").read_text())
    fields["tie_word_embeddings"] = fields["text_config"]["tie_word_embeddings"] = True
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(fields)).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory / "hf")
    (directory / "hf/config.json").write_text(json.dumps(fields))

    ids = torch.randint(3, 120, (2, 20))
    ids[0, 1:10] = ids[1, 2:11] = 127
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = torch.where((mask == 1) & (torch.arange(20) > 11), ids, -100)
    pixels = torch.randn(2, 3, 42, 42)
    out = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
    out.loss.backward()
    np.savez(
        directory / "case.npz",
        input_ids=ids.numpy(),
        labels=labels.numpy(),
        attention_mask=mask.numpy(),
        pixel_values=pixels.numpy(),
        image_row=np.arange(2),
        image_is_dummy=np.zeros(2, dtype=np.int64),
        expanded_attention_mask=mask.numpy(),
        logits=out.logits.detach().numpy(),
        loss=out.loss.item(),
    )
    norms = {
        "language_model.model.embed_tokens.weight": model.model.language_model.embed_tokens.weight.grad.norm().item(),
        "language_model.model.norm.weight": model.model.language_model.norm.weight.grad.norm().item(),
        "multi_modal_projector.linear_1.weight": model.model.multi_modal_projector.linear_1.weight.grad.norm().item(),
    }
    return directory, norms


@pytest.mark.parametrize("place", PLACES)
def test_logits_and_gradients_equal_those_of_transformers(place, tied, pool):
    directory, norms = tied
    [(case, found)] = verify(Request(hf=str(directory / "hf"), **PLACES[place]), [directory / "case.npz"], pool)
    report = compare(case, found, norms)
    assert report.ok, report.line()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["first and last stage", "two virtual stages of one rank"])
def test_training_keeps_the_copies_equal_and_goes_on_elsewhere(place, tied, config, pool, tmp_path):  # noqa: F811
    """With the distributed optimizer over two replicas, saved at step 10 and taken up on one rank."""
    tied_config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, config=str(tied[0] / "hf/config.json"))
    )
    expected = pool.run(jobs.train, at(tied_config, tmp_path / "one"), ranks=1)[0]
    parallel = Parallel(**PLACES[place])
    lines = pool.run(jobs.train, at(tied_config, tmp_path / "run", parallel), ranks=4)[0]
    assert_same(lines, expected)
    jobs.drop_after(tmp_path / "run", 10)
    lines = pool.run(jobs.train, at(tied_config, tmp_path / "run", Parallel(tp=2)), ranks=2)[0]
    assert_same(lines, expected)
