"""Tiny Hugging Face checkpoints made on the spot: tokenizer, processor, configuration and random weights.

For tests, examples and benchmarks that must not download anything. Nothing here trains, and training imports nothing
from here. Beside data/tokenizer.py, the only place that imports transformers.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from megamm.data.template import Template, template
from megamm.weights.hf import new_directory

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"


def tiny_llava(
    directory: str | Path,
    *,
    texts: Iterable[str],
    vocab_size: int = 512,
    image_size: int = 48,
    patch_size: int = 16,
    vision_width: int = 64,
    vision_mlp: int = 256,
    vision_layers: int = 3,
    vision_heads: int = 4,
    width: int = 64,
    mlp: int = 160,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 2048,
    template_name: str = "v1",
    seed: int = 0,
) -> None:
    """Write a random LLaVA-1.5 in the native layout of transformers, float32, with everything that it takes to run it.

    `texts` train the tokenizer, the words of the conversation format added to them. `vocab_size` is the number of rows
    of the embedding table, of which the tokenizer fills at most all. Sizes are those of config.json: widths and `mlp`s
    in channels, `vision_layers` counts the last layer, whose output LLaVA does not use. `directory` must not exist yet,
    or be empty. The chat template is that of `template_name`, so stock inference prompts as training does.
    """
    form = template(template_name)
    with new_directory(directory) as aside:
        tokenizer = _sentencepiece(aside, [*texts, *_words(form)], vocab_size)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=vision_width,
                intermediate_size=vision_mlp,
                num_hidden_layers=vision_layers,
                num_attention_heads=vision_heads,
                image_size=image_size,
                patch_size=patch_size,
                projection_dim=vision_width,
            ),
            text_config=LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=mlp,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                max_position_embeddings=max_positions,
                rms_norm_eps=1e-5,
                pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=(image_size // patch_size) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        model = LlavaForConditionalGeneration(config)
        _draw(model, seed)
        model.generation_config.eos_token_id = config.text_config.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(aside)
        LlavaProcessor(
            image_processor=CLIPImageProcessorPil(
                size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
            ),
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # the class token, which "default" takes away again
            image_token=IMAGE_TOKEN,
            chat_template=form.jinja(IMAGE_TOKEN),
        ).save_pretrained(aside)
        _keep_legacy(aside)


def tiny_tokenizer(directory: str | Path, texts: Iterable[str], *, vocab_size: int = 512) -> None:
    """Write a SentencePiece tokenizer as Llama's: BPE with byte fallback, ids 0, 1, 2 for unk, bos, eos, and behind its
    pieces `<image>` and `<pad>`, as llava-hf adds them. At most `vocab_size` tokens in all. `directory` must be new."""
    with new_directory(directory) as aside:
        _sentencepiece(aside, list(texts), vocab_size)


def tiny_byte_tokenizer(directory: str | Path, *special: str) -> None:
    """Write a tokenizer of single bytes, as those of Phi-2, Qwen and StableLM without their merges: 256 of them, the
    end token `<|endoftext|>`, and the `special` ones behind it. `directory` must be new."""
    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end)
    fast.add_tokens([AddedToken(token, normalized=False, special=True) for token in special], special_tokens=True)
    with new_directory(directory) as aside:
        fast.save_pretrained(aside)


def write_tokenizer(
    directory: Path, texts: Iterable[str], vocab_size: int, template_name: str, kind: str
) -> dict[str, int]:
    """Write into `directory` a tokenizer that makes words of `texts` and of the conversation format; returns its end
    and padding ids as a config.json names them.

    kind: `sentencepiece`, as Llama's (see `tiny_tokenizer`); `bytes`, byte-level BPE as Qwen2's, no token in front of a
    text, `<|im_end|>` its end, `<|endoftext|>` its padding, `<|im_start|>` whole.
    """
    words = [*texts, *_words(template(template_name))]
    if kind == "sentencepiece":
        tokenizer = _sentencepiece(directory, words, vocab_size)
        return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = ByteLevelBPETokenizer()
    for token in special:  # no merge may reach into them
        words = [piece for word in words for piece in word.split(token)]
    bpe.train_from_iterator(words, vocab_size=vocab_size - len(special), min_frequency=2, show_progress=False)
    backend = Tokenizer.from_str(bpe.to_str())
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(directory)
    return {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}


def _sentencepiece(directory: Path, texts: list[str], vocab_size: int) -> LlamaTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size - 2,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True, **special})
    )
    # Not LlamaTokenizer(vocab_file=...), which transformers 5.23 takes in silence and gives three tokens.
    tokenizer = LlamaTokenizer.from_pretrained(str(directory), local_files_only=True)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, normalized=False, special=True)})
    tokenizer.save_pretrained(directory)
    _keep_legacy(directory)
    return tokenizer


def _keep_legacy(directory: Path) -> None:
    # transformers 5.23 does not write `legacy` back and then takes it for false: the text behind <image> would lose the
    # leading space that it has where a text is cut at its markers first, as LLaVA does.
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "legacy": True}, indent=2) + "\n")


def _words(form: Template) -> list[str]:
    # Many times over, so that the long text in front of every question becomes whole words.
    return 8 * [form.first, form.later, form.reply]


@torch.no_grad()
def _draw(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draw_tensor(name, parameter, generator)


def draw_tensor(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fill `tensor` of a Hugging Face checkpoint, such that a narrow model learns fast: every matrix keeps its input's
    variance, what stands for a place (positions, class token, queries) stands out, and what a softmax over learned
    queries is made of differs enough for it to choose.

    With the published 0.02, made for widths of thousands, a model of 64 channels hardly begins to see.
    """
    if any(word in name for word in ("position_embedding", "class_embedding", "cls_token", "query_embeds")):
        return tensor.normal_(0, 1, generator=generator)
    if tensor.dim() > 1:
        is_sharp = any(word in name for word in ("crossattention.attention.query", "crossattention.attention.key"))
        return tensor.normal_(0, (3 if is_sharp else 1) * tensor[0].numel() ** -0.5, generator=generator)
    return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
