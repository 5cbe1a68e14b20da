import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megamm.data.faults import REASONS
from megamm.data.image import ImageFormat, decode
from megamm.data.indexed import Reader
from megamm.data.loader import Dataset
from megamm.errors import DataError, MegammError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data_tools" / "preprocess.py"
OWLEVAL = Path(os.environ.get("MEGAMM_OWLEVAL", ROOT.parent / "shared" / "data" / "owleval"))


def outputs(prefix):
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json", ".skipped.jsonl")}


def test_dataset_says_what_made_it(script, inputs):
    script.main(script.Options(**inputs))
    reader = Reader(inputs["output"])
    assert len(reader) == 40 and reader.info["images"] == 40
    assert reader.info["family"] == "llava" and reader.info["template"] == "v1"  # the family's for sft
    assert reader.info["tokenizer"]["file"] == "tokenizer.model" and len(reader.info["tokenizer"]["hash"]) == 64
    assert reader.info["skipped"] == {"no_answer": 1, "image_broken": 1}
    assert reader.image(0, 0) == (inputs["image_dir"] / "0.jpg").read_bytes()  # kept as they are
    skipped = [json.loads(line) for line in Path(inputs["output"] + ".skipped.jsonl").read_text().splitlines()]
    places = [(item["where"], item["reason"]) for item in skipped]
    assert places == [("llava.json item 8", "no_answer"), ("llava.json item 21", "image_broken")]
    assert str(inputs["image_dir"]) not in Path(inputs["output"] + ".json").read_text()


@pytest.mark.usefixtures("small_pieces")
def test_number_of_processes_does_not_show(script, inputs):
    script.main(script.Options(**inputs))
    expected = outputs(inputs["output"])
    for workers in (2, 5):
        script.main(script.Options(**inputs, workers=workers))
        assert outputs(inputs["output"]) == expected


def test_plain_template_and_json_lines(script, inputs):
    items = json.loads(inputs["input"][0].read_text())
    inputs["input"][0].write_text("\n".join(json.dumps(item) for item in items))
    script.main(script.Options(**inputs, template="plain"))
    reader = Reader(inputs["output"])
    ids, spans = reader.text(0)
    assert reader.info["template"] == "plain" and ids[:2].tolist() == [1, -200] and spans.tolist() == [[2, len(ids)]]


@pytest.mark.parametrize("marker", ["<image>", "<|image|>", "<picture>"])
def test_another_marker_than_the_familys(marker, script, inputs):
    script.main(script.Options(**inputs))
    expected = Path(inputs["output"] + ".bin").read_bytes()
    inputs["family"] = "mplug_owl2"
    inputs["input"][0].write_text(inputs["input"][0].read_text().replace("<image>", marker))
    if marker == "<picture>":  # neither the family's nor LLaVA's
        with pytest.raises(DataError, match="marker_count"):
            script.main(script.Options(**inputs))
        inputs["marker"] = marker
    script.main(script.Options(**inputs))
    assert Path(inputs["output"] + ".bin").read_bytes() == expected


def test_too_many_bad_samples_write_nothing_but_their_list(script, inputs):
    with pytest.raises(DataError, match=r"llava.json: 2 of 42 samples cannot be used \(no_answer 1, image_broken 1\)"):
        script.main(script.Options(**(inputs | {"max_bad": 0.01})))
    assert [path.name for path in Path(inputs["output"]).parent.iterdir()] == ["set.skipped.jsonl"]


def test_long_samples_are_counted_and_kept(script, inputs, capsys):
    script.main(script.Options(**inputs))
    lengths = Reader(inputs["output"]).num_ids + 575
    limit = int(lengths.min())
    longer = int((lengths > limit).sum())
    assert 0 < longer < 40, "every sample is longer, or none: the count says nothing"
    script.main(script.Options(**inputs, max_tokens=limit, image_tokens=576))
    assert len(Reader(inputs["output"])) == 40
    assert f"; {longer} longer than {limit} tokens" in capsys.readouterr().err


def test_prompts_and_smaller_pictures_are_said_in_the_dataset(script, inputs):
    script.main(script.Options(**inputs, prompt_style="short_answer", max_side=16, reencode=80))
    reader = Reader(inputs["output"])
    assert {"prompt_style": "short_answer", "max_side": 16, "reencode": 80}.items() <= reader.info.items()
    assert max(decode(reader.image(i, 0)).shape[0] for i in range(40)) == 16


@pytest.mark.parametrize(
    ("content", "message"), [([], "holds no samples"), ([{}, {}], "2 of 2 samples cannot be used")], ids=["none", "bad"]
)
def test_nothing_usable_is_an_error_at_any_max_bad(content, message, script, inputs):
    inputs["input"][0].write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        script.main(script.Options(**(inputs | {"max_bad": 1.0})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "lava"}, "'lava' is unknown; megamm has: llava"),
        ({"template": "vicuna"}, "template: unknown name 'vicuna'"),
        ({"tokenizer": Path("absent")}, "absent: holds no tokenizer"),
        ({"image_dir": Path("absent")}, "absent: no such directory"),
        ({"input": (Path("absent.json"),)}, "absent.json: no such file"),
        ({"max_bad": 1.5}, "--max-bad: 1.5 is no share"),
        ({"output": "out/set/"}, "--output: 'out/set/' names no file; give a prefix"),
        ({"max_side": 0}, "--max-side: 0; give a number from 1 on"),
        ({"reencode": 101}, "--reencode: 101; give a number from 1 to 100"),
        ({"prompt_style": "vqa"}, "--prompt-style: unknown 'vqa'"),
        ({"format": "llava"}, "--format: unknown 'llava'"),
    ],
)
def test_bad_options_are_one_clear_message_and_write_nothing(changes, message, script, inputs):
    with pytest.raises(MegammError, match=message):
        script.main(script.Options(**(inputs | changes)))
    assert not Path(inputs["output"]).parent.exists()


def coded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def photograph():
    y, x = np.mgrid[:30, :40]
    return Image.fromarray(np.stack([x * 6, y * 8, (x + y) % 7 * 30], axis=-1).astype(np.uint8))


def turned():
    exif = Image.Exif()
    exif[274] = 6  # orientation: turn by 90 degrees
    return coded(photograph(), "JPEG", exif=exif)


UNUSUAL = {  # all named .jpg
    "png": lambda: coded(photograph(), "PNG"),
    "cmyk": lambda: coded(photograph().convert("CMYK"), "JPEG"),
    "grey": lambda: coded(photograph().convert("L"), "JPEG"),
    "palette": lambda: coded(photograph().quantize(16), "PNG"),
    "palette with transparency": lambda: coded(photograph().quantize(16), "PNG", transparency=b"\x00\x80"),
    "16 bit": lambda: coded(Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16)), "PNG"),
    "exif orientation": turned,
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_unusual_pictures_are_no_faults(script, inputs):
    """Each ends as Pillow's `convert("RGB")`, in the orientation in which it is stored."""
    items = []
    for name, make in UNUSUAL.items():
        (inputs["image_dir"] / f"{name}.jpg").write_bytes(make())
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": name}]
        items.append({"image": f"{name}.jpg", "conversations": turns})
    inputs["input"][0].write_text(json.dumps(items))
    script.main(script.Options(**(inputs | {"max_bad": 0.0})))
    reader = Reader(inputs["output"])
    assert reader.info["skipped"] == {} and len(reader) == len(UNUSUAL)
    for i, make in enumerate(UNUSUAL.values()):
        with Image.open(io.BytesIO(make())) as picture:
            expected = np.asarray(picture.convert("RGB"))
        assert expected.shape == (30, 40, 3)
        assert np.array_equal(decode(reader.image(i, 0)), expected)


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
FAULTY = {
    "missing picture": ({"image": "absent.jpg"}, "image_missing"),
    "empty picture": ({"image": "empty.jpg"}, "image_broken"),
    "truncated picture": ({"image": "truncated.jpg"}, "image_broken"),
    "a page instead of a picture": ({"image": "page.jpg"}, "image_broken"),
    "a picture outside": ({"image": "../llava.json"}, "image_outside"),
    "more markers than pictures": ({"conversations": TURNS + TURNS}, "marker_count"),
    "a marker and no picture": ({"image": None}, "marker_count"),
    "more pictures than markers": ({"image": ["1.jpg", "3.jpg"]}, "marker_count"),
    "a picture and no marker": ({"conversations": [{"from": "human", "value": "What?"}, TURNS[1]]}, "marker_count"),
    "no answer": ({"conversations": TURNS[:1]}, "no_answer"),
    "empty answer": ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "no_answer"),
    "no turns": ({"conversations": []}, "no_answer"),
    "two questions": ({"conversations": [TURNS[0], TURNS[0]]}, "bad_roles"),
    "another role": ({"conversations": [TURNS[0], {"from": "bot", "value": "This."}]}, "bad_roles"),
    "text instead of turns": ({"conversations": "USER: What? ASSISTANT: This."}, "bad_record"),
    "turns without text": ({"conversations": [{"from": "human"}, {"from": "gpt"}]}, "bad_record"),
    "answer is a number": ({"conversations": [TURNS[0], {"from": "gpt", "value": 7}]}, "bad_record"),
}


def test_faults_are_skipped_counted_and_listed_and_end_the_run_above_max_bad(script, inputs):
    picture = (inputs["image_dir"] / "1.jpg").read_bytes()
    for name, content in (("empty", b""), ("truncated", picture[:-200]), ("page", b"<html>404</html>")):
        (inputs["image_dir"] / f"{name}.jpg").write_bytes(content)
    good = {"image": "1.jpg", "conversations": TURNS}
    faulty = [good | changes for changes, _ in FAULTY.values()]
    inputs["input"][0].write_text(json.dumps([good, *faulty, good, good]))
    share = len(faulty) / (len(faulty) + 3)

    script.main(script.Options(**(inputs | {"max_bad": share})))
    reader = Reader(inputs["output"])
    assert len(reader) == 3
    reasons = [reason for _, reason in FAULTY.values()]
    assert reader.info["skipped"] == {reason: reasons.count(reason) for reason in reasons}
    listed = [json.loads(line) for line in Path(inputs["output"] + ".skipped.jsonl").read_text().splitlines()]
    assert [(item["where"], item["reason"]) for item in listed] == [
        (f"llava.json item {i}", reason) for i, reason in enumerate(reasons, start=2)
    ]
    assert all(item["message"].startswith(REASONS[item["reason"]]) for item in listed)

    inputs["output"] = str(Path(inputs["output"]).with_name("other"))
    message = r"17 of 20 samples cannot be used .* --max-bad allows 84.90%; see .*mend the data"
    with pytest.raises(DataError, match=message):
        script.main(script.Options(**(inputs | {"max_bad": share - 0.001})))
    assert [path.name for path in Path(inputs["output"]).parent.glob("other*")] == ["other.skipped.jsonl"]


def test_pictures_that_are_checked_are_not_decoded_again(script, inputs):
    picture = (inputs["image_dir"] / "1.jpg").read_bytes()
    for name, content in (("truncated", picture[:-200]), ("page", b"<html>404</html>")):
        (inputs["image_dir"] / f"{name}.jpg").write_bytes(content)
    items = [{"image": f"{name}.jpg", "conversations": TURNS} for name in ("1", "truncated", "page")]
    inputs["input"][0].write_text(json.dumps(items))
    script.main(script.Options(**(inputs | {"max_bad": 0.5, "pictures_are_checked": True})))
    reader = Reader(inputs["output"])
    assert [reader.image(i, 0) for i in range(len(reader))] == [picture, picture[:-200]]
    assert reader.info["skipped"] == {"image_broken": 1}


def test_command_line_ends_with_a_message_and_a_status(inputs):
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in inputs.items() if name not in ("max_bad", "input")
    ]
    options += ["--input", *inputs["input"]]
    command, environment = [sys.executable, SCRIPT, *options], os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and "--max-bad allows 1.00%" in result.stderr


def test_every_real_photograph_decodes(script, inputs, tmp_path):
    if not OWLEVAL.is_dir():
        pytest.skip(f"no OwlEval pictures at {OWLEVAL}; set MEGAMM_OWLEVAL")
    changes = {"input": (OWLEVAL / "llava.json",), "image_dir": OWLEVAL / "images", "max_bad": 0.0}
    script.main(script.Options(**(inputs | changes), workers=2))
    items = json.loads((OWLEVAL / "llava.json").read_text())
    reader = Reader(inputs["output"])
    assert len(reader) == len(items) and reader.info["images"] == sum("image" in item for item in items)
    dataset = Dataset(inputs["output"], ImageFormat(size=28, mean=(0.5, 0.5, 0.5), tokens=4), max_tokens=4096)
    first_with = {item["image"]: i for i, item in reversed(list(enumerate(items))) if "image" in item}
    assert len(first_with) == len(list((OWLEVAL / "images").iterdir()))
    for i in first_with.values():
        sample = dataset[i]
        assert sample.num_images == 1 and sample.pixels_I3HW.float().std() > 6


def test_an_output_is_never_written_over_its_input(script, inputs):
    source = inputs["input"][0] if isinstance(inputs["input"], (tuple, list)) else inputs["input"]
    before = Path(source).read_bytes()
    with pytest.raises(DataError, match="would be written over --input .*; choose another prefix"):
        script.main(script.Options(**inputs | {"output": str(Path(source).with_suffix(""))}))
    assert Path(source).read_bytes() == before and not Path(source).with_suffix(".parts").exists()


def test_a_family_with_placeholders_says_what_stands_for_a_picture(script, inputs, tmp_path):
    tokenizer = tmp_path / "byte_bpe"
    tokenizer.mkdir()
    source = ROOT / "tests" / "golden" / "template_masks" / "tokenizers" / "byte_bpe_457.json"
    (tokenizer / "tokenizer.json").write_bytes(source.read_bytes())
    special = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = {str(457 + i): {"content": token} | special for i, token in enumerate(("<|im_start|>", "<|im_end|>"))}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    inputs |= {"family": "mplug_owl3", "tokenizer": tokenizer, "tile_size": 8, "max_views": 6, "max_bad": 0.9}
    script.main(script.Options(**inputs, cut="single", view_text="v3"))
    reader = Reader(inputs["output"])
    assert len(reader.info["placeholder"]) > 1 and "<image>" not in str(reader.info)
    assert reader.info["views"] == {"cut": "single", "text": "v3", "tile_size": 8, "max_frames": 16, "max_views": 6}
    assert reader.info["skipped"]["too_many_views"] + len(reader) == 40 and reader.info["images"] > len(reader)
    dataset = Dataset(inputs["output"], ImageFormat(size=8, mean=(0.5,) * 3, aspect="square",
                                                    resize="squash", tokens=4), 10**4)  # fmt: skip
    assert dataset[0].num_images == reader.num_images[0] > 1
    with pytest.raises(DataError, match="--tile-size: 0"):
        script.main(script.Options(**inputs | {"tile_size": 0}))
