import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from megamm.data.faults import SampleFault
from megamm.data.template import TEMPLATES, template
from megamm.data.text import expand, tokenise
from megamm.data.tokenizer import load_tokenizer
from megamm.errors import DataError

GOLDEN = Path(__file__).parent.parent / "golden" / "template_masks"
ENTRIES = {
    name: entry
    for file in ("tinyllava_bench", "tinyllava_factory", "imp")
    for name, entry in json.loads((GOLDEN / f"{file}.json").read_text()).items()
    if name != "phi_empty_answer"  # the original masks the whole sample; here it is a fault
}
MISCOUNTED = [name for name in ENTRIES if name.startswith("phi3_legacyFalse")]  # ids as here, targets lost
ROUNDS = [("q", "a"), ("r", "b")]


def tokenise_entry(entry, make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer(entry["tokenizer"]))
    turns = [(turn["from"], turn["value"]) for turn in entry["conversation"]]
    num_images = sum("<image>" in text for _, text in turns)
    ids, spans = tokenise(turns, num_images, template(entry["template"]), tokenizer, "<image>")
    return tokenizer, turns, ids, spans


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in MISCOUNTED])
def test_ids_and_targets_equal_the_authors(name, make_tokenizer):
    entry = ENTRIES[name]
    _, _, ids, spans = tokenise_entry(entry, make_tokenizer)
    assert ids.tolist() == entry["input_ids"]
    assert expand(ids, spans, tokens_per_image=1, max_tokens=10**6)[1].tolist() == entry["labels"]


@pytest.mark.parametrize("name", MISCOUNTED)
def test_targets_are_exact_where_the_authors_lose_the_sample(name, make_tokenizer):
    entry = ENTRIES[name]
    tokenizer, turns, ids, spans = tokenise_entry(entry, make_tokenizer)
    assert ids.tolist() == entry["input_ids"]
    answers = [text + "<|end|>" for role, text in turns if role == "gpt"]
    assert [tokenizer.decode(ids[start:end].tolist()).strip() for start, end in spans] == answers


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v1", "SYS USER: q ASSISTANT: a</s>USER: r ASSISTANT: b</s>"),
        ("llava_v1", "SYS USER: q ASSISTANT: a</s>USER: r ASSISTANT: b</s>"),
        ("phi", "SYS USER: q ASSISTANT: a<|endoftext|>USER: r ASSISTANT: b<|endoftext|>"),
        ("gemma", "SYS USER: q ASSISTANT: a<eos>USER: r ASSISTANT: b<eos>"),
        ("llava_llama_2", "[INST] <<SYS>>\nSYS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST] b </s>"),
        ("mistral_instruct", "[INST] q [/INST] a </s>[INST] r [/INST] b </s>"),
        ("mistral", "[INST] q [/INST]a</s>[INST] r [/INST]b</s>"),
        (
            "mplug_owl2",
            "USER: q ASSISTANT: a</s>USER: r ASSISTANT: b</s>",
        ),
        (
            "qwen2",
            "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
            "\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
        ),
    ],
)
def test_rendering(name, text):
    rendered, ranges = TEMPLATES[name].render(ROUNDS, "<image>")
    system = re.search(r"(A chat between.*questions\.)|(You are a helpful.*natural language\.)", rendered)
    assert (rendered.replace(system[0], "SYS") if system else rendered) == text
    assert [rendered[a:b].strip().removesuffix(TEMPLATES[name].end.strip()).strip() for a, b in ranges] == ["a", "b"]
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))


def test_user_is_not_human():
    for name, who in (("v1", "user"), ("llava_v1", "human")):
        assert f"a curious {who} and" in TEMPLATES[name].first and f"the {who}'s questions." in TEMPLATES[name].first


def test_captions_take_one_picture_and_one_round():
    assert template("plain").render([("Describe.\n<image>", "A cat.")], "<image>") == ("<image>A cat.\n", [(7, 14)])
    with pytest.raises(SampleFault) as fault:
        template("plain").render(ROUNDS, "<image>")
    assert fault.value.reason == "bad_roles"
    with pytest.raises(SampleFault) as fault:
        template("plain").render(ROUNDS[:1], "<image>")
    assert fault.value.reason == "marker_count"


def test_unknown_name_lists_the_known():
    with pytest.raises(DataError, match="unknown name 'vicuna'; choose one of v1, vicuna_v1"):
        template("vicuna")


def test_template_of_another_tokenizer_is_refused(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("byte_bpe"))
    template("phi").check(tokenizer)
    template("plain").check(tokenizer)
    with pytest.raises(DataError, match="'</s>'.*is 4 tokens in tokenizer.json; choose the template"):
        template("v1").check(tokenizer)


def test_llama_templates_fit_a_llama_tokenizer(make_tokenizer):
    tokenizer = load_tokenizer(make_tokenizer("spm"))
    for name in ("v1", "llava_v1", "llava_llama_2", "mistral_instruct", "mistral", "llama", "plain"):
        template(name).check(tokenizer)
