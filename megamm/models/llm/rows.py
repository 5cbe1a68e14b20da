"""Rows that the tables of several decoders are made of. Names are given in; none is known here."""

from megamm.models.options import LlmOptions
from megamm.weights.keymap import Dims, Row

LAYER = "decoder.layers.{i}."
"""What the canonical names of a layer begin with."""


def dims(options: LlmOptions) -> Dims:
    """The sizes that packing and cutting need."""
    return Dims(
        layers=options.num_layers,
        heads=options.num_heads,
        groups=options.num_groups,
        vocab=options.vocab_size,
        vocab_padded=options.padded_vocab_size,
    )


def qkv_size(options: LlmOptions) -> int:
    """Rows of queries, keys and values together."""
    return (options.num_heads + 2 * options.num_groups) * options.head_dim


def vocabulary(options: LlmOptions, embedding: str, head: str) -> list[Row]:
    """The embedding, and the head with its bias unless they are one."""
    vocab, h = options.padded_vocab_size, options.hidden_size
    rows = [Row("embedding.word_embeddings.weight", (f"{embedding}.weight",), (vocab, h), tp="vocab")]
    if not options.has_tied_embeddings:
        rows.append(Row("output_layer.weight", (f"{head}.weight",), (vocab, h), tp="vocab"))
    if options.has_head_bias:
        rows.append(Row("output_layer.bias", (f"{head}.bias",), (vocab,), tp="vocab"))
    return rows


def norm(options: LlmOptions, name: str, hf: str) -> list[Row]:
    """A norm over the hidden size. `name`: its canonical name up to `weight`, separator included."""
    kinds = ("weight", "bias") if options.norm == "LayerNorm" else ("weight",)
    return [Row(f"{name}{kind}", (f"{hf}.{kind}",), (options.hidden_size,)) for kind in kinds]


def linear(
    name: str, hf: tuple[str, ...], shape: tuple[int, int], *, tp: str, has_bias: bool, pack: str = "same"
) -> list[Row]:
    """A linear of [out, in] and its bias, packed and cut alike; the bias of one cut by `row` is added after the sum
    over the ranks, and every rank has the whole of it."""
    rows = [Row(f"{name}.weight", tuple(f"{key}.weight" for key in hf), shape, pack=pack, tp=tp)]
    if has_bias:
        cut = None if tp == "row" else tp
        rows.append(Row(f"{name}.bias", tuple(f"{key}.bias" for key in hf), shape[:1], pack=pack, tp=cut))
    return rows
