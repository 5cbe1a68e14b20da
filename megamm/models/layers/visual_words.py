"""Visual words: what the vocabulary makes of a visual token, and the llm's prediction of it. Source: arXiv 2403.07720.

A head over the vocabulary, `vm_head`, gives each visual token z the distribution p = softmax(W z). It is compared with
the distribution q that the llm predicts for that position from the one before; in one variant the llm also reads the
mean embedding under p, the pseudo image feature, instead of z. Both matrices are cut over the vocabulary: each rank
holds its columns of the rows of one chunk at a time, never a whole vocabulary, never all visual tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megamm.batch import IMAGE, Batch
from megamm.config.schema import Loss
from megamm.models.options import LlmOptions

CHUNK = 1024
"""Visual tokens whose float32 logits exist at a time."""


class VisualWords(MegatronModule):
    """vm_head, and what is computed with it. Lives where `llm.head` does, and with pseudo image features where
    `llm.embed` does, too; in two stages these are copies of one weight.

    config: one without sequence parallelism; tokens are whole on every rank here. is_copy: whether this is the copy
    that a checkpoint leaves to the other stage.
    """

    def __init__(self, options: LlmOptions, config: TransformerConfig, is_copy: bool):
        super().__init__(config=config)
        self.num_words = options.vocab_size
        self.is_copy = is_copy
        self.vm_head = ColumnParallelLinear(
            options.hidden_size,
            options.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
        )
        self.pseudo_features = PseudoFeatures()

    def log_words(self, rows_KH: Tensor) -> Tensor:
        """Visual tokens [K, H] -> log p, float32 [K, V / tp]."""
        return vocabulary_log_softmax(vocabulary_logits(rows_KH, self.vm_head.weight, self.num_words))

    def forward(
        self, features_RH: Tensor, hidden_SBH: Tensor, head_weight_VH: Tensor, batch: Batch, loss: Loss
    ) -> Tensor:
        """The divergence at every position that predicts a visual token, float32 [B, S]; elsewhere 0.

        features_RH: visual tokens, image after image; hidden_SBH: the llm's output, normed; head_weight_VH: this rank's
        rows of the llm's head. All whole on every tensor parallel rank, and so are their gradients.
        """
        slots_K, rows_K = batch.slots_K, batch.rows_K
        is_predicted_K = batch.positions_BS.flatten()[slots_K] > 0
        if not len(slots_K):  # without pictures, too, every parameter gets its gradient: that of one row, times zero
            slots_K = rows_K = slots_K.new_zeros(1)
            is_predicted_K = slots_K > 0
        before_K = (slots_K - 1).clamp(min=0)
        rows = features_RH[rows_K].split(CHUNK)
        hidden = hidden_SBH.transpose(0, 1).reshape(-1, hidden_SBH.size(-1))[before_K].split(CHUNK)
        kl_K = torch.cat(
            [_once(self._divergence, *chunk, head_weight_VH, loss) for chunk in zip(rows, hidden, strict=True)]
        )
        kl_K = torch.where(is_predicted_K, kl_K, 0.0)
        return kl_K.new_zeros(batch.ids_BS.numel()).index_add(0, before_K, kl_K).view_as(batch.ids_BS)

    def _divergence(self, rows_KH: Tensor, hidden_KH: Tensor, head_weight_VH: Tensor, loss: Loss) -> Tensor:
        """KL(teacher || student) of each row, float32 [K]."""
        words = self.log_words(rows_KH)
        predicted = vocabulary_log_softmax(vocabulary_logits(hidden_KH, head_weight_VH, self.num_words))
        teacher, student = (words, predicted) if loss.teacher == "words" else (predicted, words)
        if loss.detach_teacher and teacher.requires_grad:
            teacher.register_hook(torch.zeros_like)  # not detach: what is trained must get a gradient, if only zeros
        # Columns of the padding are -inf on both sides.
        ratio = (teacher - student).masked_fill(teacher == -torch.inf, 0.0)
        return reduce_from_tensor_model_parallel_region((teacher.exp() * ratio).sum(-1))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's; a copy is loaded, and stored by the other stage only."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.is_copy:
            weight = found[f"{prefix}vm_head.weight"]
            weight.replica_id = (1, *weight.replica_id[1:])
        return found


class PseudoFeatures(torch.nn.Module):
    """From a visual token to the mean embedding under its visual words. Has no weights; a module, so that it can be
    watched."""

    def forward(self, visual_PIH: Tensor, embedding_VH: Tensor, log_words: Callable[[Tensor], Tensor]) -> Tensor:
        """Visual tokens [P, I, H] -> pseudo image features of the same shape. embedding_VH: this rank's rows."""
        rows = visual_PIH.reshape(-1, visual_PIH.size(-1)).split(CHUNK)
        return torch.cat([_once(_mean_embedding, chunk, embedding_VH, log_words) for chunk in rows]).view_as(visual_PIH)


def _mean_embedding(rows_KH: Tensor, embedding_VH: Tensor, log_words: Callable[[Tensor], Tensor]) -> Tensor:
    words_KV = log_words(rows_KH).exp().to(embedding_VH.dtype)
    return reduce_from_tensor_model_parallel_region(words_KV @ embedding_VH)


def _once(function: Callable[..., Tensor], *args: object) -> Tensor:
    """`function` of `args`, keeping nothing of what it computes for the backward pass, which runs it again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def word_targets(batch: Batch) -> Tensor:
    """bool [B, S]: True where the position behind, in the same sequence, is a visual token."""
    is_predicted_BS = (batch.ids_BS == IMAGE) & (batch.positions_BS > 0)
    return F.pad(is_predicted_BS[:, 1:], (0, 1))


def gather_rows(x_SBH: Tensor) -> Tensor:
    """Slices of all tensor parallel ranks, joined. Every rank goes on with the whole, so each needs back only its own
    slice of a gradient that is the same everywhere."""
    return gather_from_sequence_parallel_region(x_SBH, tensor_parallel_output_grad=False)


def vocabulary_logits(rows_KH: Tensor, weight_VH: Tensor, num_words: int) -> Tensor:
    """Rows [K, H] and this rank's rows of a matrix over the vocabulary -> float32 [K, V / tp], padding -inf."""
    logits_KV = F.linear(copy_to_tensor_model_parallel_region(rows_KH), weight_VH).float()
    first = len(weight_VH) * parallel_state.get_tensor_model_parallel_rank()
    is_padding_V = torch.arange(first, first + len(weight_VH), device=logits_KV.device) >= num_words
    return logits_KV.masked_fill(is_padding_V, -torch.inf)


def vocabulary_log_softmax(logits_KV: Tensor) -> Tensor:
    """log softmax over the columns of all tensor parallel ranks, float32 [K, V / tp]; padding stays -inf."""
    return _VocabularyLogSoftmax.apply(logits_KV)


class _VocabularyLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        highest_K1 = logits_KV.amax(-1, keepdim=True)
        dist.all_reduce(highest_K1, dist.ReduceOp.MAX, group=group)
        shifted_KV = logits_KV - highest_K1
        total_K1 = shifted_KV.exp().sum(-1, keepdim=True)
        dist.all_reduce(total_K1, group=group)
        log_KV = shifted_KV - total_K1.log()
        ctx.save_for_backward(log_KV)
        return log_KV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (log_KV,) = ctx.saved_tensors
        total_K1 = grads[0].sum(-1, keepdim=True)
        dist.all_reduce(total_K1, group=parallel_state.get_tensor_model_parallel_group())
        return grads[0] - log_KV.exp() * total_K1
