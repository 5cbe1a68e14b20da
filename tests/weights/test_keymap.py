"""The table: expansion over layers, prefixes, packing round trips, and which dialect a set of names is written in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamm.errors import CheckpointError
from megamm.weights.keymap import Dims, Keep, KeyMap, Row, fill, match

ROWS = (
    Row("embed.weight", ("model.embed.weight",), (8, 3), tp="vocab"),
    Row("layers.{i}.qkv.weight", tuple(f"model.layers.{{i}}.{x}.weight" for x in "qkv"), (16, 3), pack="qkv", tp="col"),
    Row("layers.{i}.fc1.weight", ("model.layers.{i}.gate", "model.layers.{i}.up"), (8, 3), pack="cat2", tp="col2"),
    Row("layers.{i}.fc2.weight", ("model.layers.{i}.down",), (3, 4), tp="row"),
    Row("norm.weight", ("model.norm",), (3,)),
    Keep("model.layers.{i}.inv_freq"),
    Keep("model.layers.{i}.down"),
)
DIMS = Dims(layers=2, heads=4, groups=2, vocab=5, vocab_padded=8)
TABLE = KeyMap(ROWS, DIMS)


def test_layers_are_expanded_on_both_sides():
    names = [entry.name for entry in TABLE.entries()]
    assert len(names) == 2 + 3 * 2
    entry = TABLE["layers.1.qkv.weight"]
    assert entry.hf == ("model.layers.1.q.weight", "model.layers.1.k.weight", "model.layers.1.v.weight")
    assert "layers.2.qkv.weight" not in TABLE


def test_partition_dimensions_are_those_of_the_tp_column():
    dims = {entry.name: entry.partition_dim for entry in TABLE.entries()}
    assert dims["embed.weight"] == dims["layers.0.qkv.weight"] == dims["layers.0.fc1.weight"] == 0
    assert dims["layers.0.fc2.weight"] == 1 and dims["norm.weight"] is None


def test_renamed_takes_the_longest_prefix_and_each_part_keeps_its_sizes():
    tower = KeyMap([Row("layers.{i}.x", ("layers.{i}.x",), (1,))], Dims(layers=3))
    vlm = TABLE.renamed(ours="llm.", hf={"model.": "lm.", "model.norm": "head.norm"}) + tower.renamed(
        ours="vision.", hf={"": "tower."}
    )
    assert vlm["llm.norm.weight"].hf == ("head.norm",)
    assert vlm["llm.layers.0.fc2.weight"].hf == ("lm.layers.0.down",)
    assert vlm["vision.layers.2.x"].hf == ("tower.layers.2.x",)
    assert "llm.layers.2.fc2.weight" not in vlm


def test_keep_takes_any_layer_but_never_a_name_of_a_row():
    names = ["model.layers.7.inv_freq", "model.layers.7.down", "model.layers.0.down", "model.layers.x.inv_freq"]
    renamed = TABLE.renamed(ours="llm.", hf={"model.": "lm."})
    assert TABLE.kept(names).keys() == {"model.layers.7.inv_freq", "model.layers.7.down"}
    across = renamed.kept(["lm.layers.7.inv_freq"])
    assert across == {"lm.layers.7.inv_freq": "llm.model.layers.7.inv_freq"}
    other = TABLE.renamed(ours="llm.", hf={"model.": "base.model."})
    assert other.kept_hf(across.values()) == {"llm.model.layers.7.inv_freq": "base.model.layers.7.inv_freq"}


@pytest.mark.parametrize(
    "row, dims, message",
    [
        (Row("a", ("b",), (8,), pack="fold"), DIMS, "unknown pack 'fold'"),
        (Row("a", ("b",), (8,), tp="diagonal"), DIMS, "unknown .* tp 'diagonal'"),
        (Row("a", ("b",), (8,), pack="qkv"), DIMS, "pack 'qkv' takes 3 tensors, not 1"),
        (Row("a.{i}", ("b",), (8,)), DIMS, "on both sides or on neither"),
        (Row("a", ("b",), (0,), tp="vocab"), Dims(), "needs dims.vocab and a dims.vocab_padded that holds it"),
        (Row("a", ("b",), (5,), tp="vocab"), DIMS, "dims.vocab_padded rows, not shape .5,."),
        (Row("a", ("q", "k", "v"), (8,), pack="qkv"), Dims(heads=4, groups=3), "multiple of dims.groups"),
        (Keep("a.{i}", "b"), DIMS, "as often in its name b"),
    ],
)
def test_a_row_that_cannot_be_right_is_refused(row, dims, message):
    with pytest.raises(ValueError, match=message):
        KeyMap([row], dims)


@pytest.mark.parametrize("second", [Row("a", ("y",), (1,)), Row("b", ("x",), (1,))])
def test_a_name_in_two_rows_is_refused(second):
    with pytest.raises(ValueError, match="more than one row"):
        KeyMap([Row("a", ("x",), (1,)), second]).entries()


KINDS = [("same", None), ("same", "col"), ("same", "row"), ("same", "vocab"), ("cat2", None), ("cat2", "col2"),
         ("qkv", None), ("qkv", "col")]  # fmt: skip


@st.composite
def tables(draw):
    """A table of one to six rows of any packing and cut, per layer or not, weights and biases, whose cut dimensions
    divide by 4, under random prefixes; and the prefix of a release that spells its names in another way."""
    groups = draw(st.integers(1, 3))
    vocab = draw(st.integers(1, 20))
    padded = -(-(vocab + draw(st.integers(0, 7))) // 4) * 4
    dims = Dims(layers=draw(st.integers(0, 3)), heads=groups * draw(st.integers(1, 3)), groups=groups, vocab=vocab,
                vocab_padded=padded)  # fmt: skip
    rows = []
    for number, (pack, tp) in enumerate(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))):
        num_rows = {"same": 4, "cat2": 8, "qkv": 4 * (dims.heads + 2 * groups)}[pack] * draw(st.integers(1, 3))
        shape = (padded if tp == "vocab" else num_rows, 4 * draw(st.integers(1, 3)))
        shape = shape if tp == "row" else shape[: draw(st.integers(1, 2))]
        layer = draw(st.sampled_from(["", "layers.{i}."]))
        hf = tuple(f"hf.{layer}{number}.{x}" for x in range({"same": 1, "cat2": 2, "qkv": 3}[pack]))
        rows.append(Row(f"{layer}{number}", hf, shape, pack=pack, tp=tp))
    prefix, alias = draw(st.permutations(["", "model.", "model.language_model.", "lm."]))[:2]
    table = KeyMap(rows, dims).renamed(ours="llm.", hf={"hf.": f"{prefix}hf."})
    return table.accepting({f"{alias}hf.": f"{prefix}hf."}), f"{prefix}hf.", f"{alias}hf."


@given(
    tables=tables(),
    tp=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    is_alias=st.booleans(),
)
def test_import_slice_join_export_is_the_identity(tables, tp, dtype, is_alias):
    table, prefix, alias = tables
    shapes = {key: shape for entry in table.entries() for key, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
    tensors = {key: torch.randn(shape).to(dtype) for key, shape in shapes.items()}
    release = {alias + key.removeprefix(prefix) if is_alias else key: tensor for key, tensor in tensors.items()}
    if release:
        assert match(release, {"only": table}) == "only"
    found = {key: release[theirs] for key, theirs in table.spelt(release).items()}
    back = {}
    for entry in table.entries():
        packed = entry.pack([found[name] for name in entry.hf])
        assert packed.shape == entry.shape
        slices = [entry.slice(packed, rank, tp).clone() for rank in range(tp)]
        assert all(part.shape == slices[0].shape for part in slices)
        assert torch.equal(entry.join(slices), packed)
        back |= entry.to_hf(slices)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == dtype for name in tensors)


def test_of_two_spellings_of_one_name_the_second_is_left_over():
    table = TABLE.accepting({"lm.": "model."})
    with pytest.raises(CheckpointError, match="not in its table: lm.norm\n"):
        match(TABLE.hf_names | {"lm.norm"}, {"only": table})


def test_what_is_new_may_be_missing_but_only_whole():
    new = ("norm", "layers.")
    layers = {key for key in TABLE.hf_names if "layers" in key}
    for absent in ({"model.norm"}, layers, layers | {"model.norm"}):
        assert match(TABLE.hf_names - absent, {"only": TABLE}, (), new) == "only"
    with pytest.raises(CheckpointError, match="missing: model.layers.1.up\n"):
        match(TABLE.hf_names - {"model.layers.1.up"}, {"only": TABLE}, (), new)


def test_the_shapes_of_a_release_follow_from_ours():
    assert TABLE["embed.weight"].hf_shapes == [(5, 3)]
    assert TABLE["layers.0.qkv.weight"].hf_shapes == [(8, 3), (4, 3), (4, 3)]
    assert TABLE["layers.0.fc1.weight"].hf_shapes == [(4, 3), (4, 3)]


def test_tensors_of_two_dtypes_are_not_packed_together():
    entry = TABLE["layers.0.fc1.weight"]
    with pytest.raises(CheckpointError, match="model.layers.0.up torch.bfloat16"):
        entry.pack([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16)])


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("embed.weight", [(6, 3)]),
        ("layers.0.qkv.weight", [(8, 3), (8, 3), (8, 3)]),
        ("layers.0.qkv.weight", [(8, 3), (4, 3), (2, 3)]),
        ("layers.0.qkv.weight", [(8, 3), (4, 2), (4, 2)]),
        ("layers.0.fc1.weight", [(4, 3), (2, 3)]),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shapes):
    with pytest.raises(CheckpointError, match=name):
        TABLE[name].pack([torch.zeros(shape) for shape in shapes])


@pytest.mark.parametrize("name, shape", [("embed.weight", (5, 3)), ("layers.0.qkv.weight", (9, 3)),
                                         ("layers.0.fc1.weight", (3, 3))])  # fmt: skip
def test_stored_shapes_that_do_not_fit_are_named(name, shape):
    with pytest.raises(CheckpointError, match=name):
        TABLE[name].unpack(torch.zeros(shape))


def test_an_uneven_cut_is_refused():
    with pytest.raises(CheckpointError, match="layers.0.fc2.weight"):
        TABLE["layers.0.fc2.weight"].slice(torch.zeros(4, 6), 0, 4)


def dialects():
    return {"plain": TABLE, "nested": TABLE.renamed(hf={"model.": "lm.model."})}


@pytest.mark.parametrize("dialect", ["plain", "nested"])
def test_match_finds_the_dialect(dialect):
    prefix = {"plain": "", "nested": "lm."}[dialect]
    names = [prefix + name for name in TABLE.hf_names | {"model.layers.9.inv_freq"}]
    assert match(names, dialects()) == dialect


def test_match_lists_what_is_missing_and_left_over_in_the_nearest():
    names = TABLE.hf_names - {"model.norm"} | {"model.surprise"}
    with pytest.raises(CheckpointError, match=r"'plain'(?s:.*)missing: model.norm\n(?s:.*)table: model.surprise\n"):
        match(names, dialects())


def test_match_refuses_two_dialects():
    with pytest.raises(CheckpointError, match="a, b"):
        match(TABLE.hf_names, {"a": TABLE, "b": TABLE})


def test_a_tower_fills_only_what_is_missing_and_finds_its_prefix():
    vision = [
        Row("x.{i}", ("encoder.layers.{i}.x",), (1,)), Row("y", ("y",), (1,)), Keep("encoder.layers.{i}.x"),
        Keep("post"),
    ]  # fmt: skip
    table = TABLE + KeyMap(vision, Dims(layers=2)).renamed(ours="vision.", hf={"": "tower.vision_model."})
    tower = [f"vision_model.{name}" for name in ("encoder.layers.0.x", "encoder.layers.1.x", "encoder.layers.2.x",
                                                 "y", "post")] + ["text_model.y", "logit_scale"]  # fmt: skip
    names = TABLE.hf_names | {"tower.vision_model.y"}
    filled = fill(names, tower, table)
    assert filled == {
        f"tower.vision_model.{name}": f"vision_model.{name}"
        for name in ("encoder.layers.0.x", "encoder.layers.1.x", "encoder.layers.2.x", "post")
    }
    assert match(names, {"only": table}, [tower]) == "only"
    with pytest.raises(CheckpointError, match="--tower"):
        match(names, {"only": table})
