"""The decoder of every family: megatron-core's GPTModel, one stage's share of it."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megamm import backend
from megamm.models.options import LlmOptions
from megamm.models.spec import decoder_layer_spec
from megamm.parallel.placement import Stage


class Decoder(GPTModel):
    """The units `llm.*` of one stage. The embedding is not scattered: visual tokens are written into it first."""

    def __init__(self, options: LlmOptions, config: TransformerConfig, stage: Stage):
        super().__init__(
            config,
            TransformerBlockSubmodules(
                layer_specs=[decoder_layer_spec(options, layer) for layer in stage.llm_layers],
                layer_norm=backend.current().layers.norm,
            ),
            vocab_size=options.padded_vocab_size,
            max_sequence_length=options.max_positions,
            pre_process=stage.has("llm.embed"),
            post_process=stage.has("llm.head"),
            share_embeddings_and_output_weights=options.has_tied_embeddings,
            position_embedding_type="rope",
            rotary_percent=options.rotary_factor,
            rotary_base=options.rope_theta,
            scatter_embedding_sequence_parallel=False,
            vp_stage=stage.vp_stage,
        )
        rows = options.padded_vocab_size // config.tensor_model_parallel_size
        if self.post_process and options.has_head_bias:
            # megatron-core builds its head without one, but adds, stores and reduces it where it is there.
            self.output_layer.bias = torch.nn.Parameter(
                torch.empty(rows, device=backend.current().device, dtype=config.params_dtype)
            )
        if self.post_process and options.padded_vocab_size > options.vocab_size:
            first = rows * parallel_state.get_tensor_model_parallel_rank()
            self._num_real_columns = max(0, min(rows, options.vocab_size - first))
            self.output_layer.register_forward_hook(self._silence_padding)

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark the copies of a tied embedding; megatron-core does it for the first and the last stage only.

        `shared_embedding` puts a copy in a gradient bucket of its own, `shared` keeps the head's copy out of the global
        gradient norm. Values come from `parameters.fill` or a checkpoint, which give both copies the same.
        """
        if not self.share_embeddings_and_output_weights:
            return
        weight = self.shared_embedding_or_output_weight()
        if self.pre_process and self.post_process:
            weight.zero_out_wgrad = True
        elif weight is not None:
            weight.shared_embedding = True
            weight.shared = self.post_process

    @property
    def tied_copy(self) -> torch.nn.Parameter | None:
        """This stage's copy of a tied embedding whose other copy lies in another stage; None where there is none."""
        is_copy = self.share_embeddings_and_output_weights and self.pre_process != self.post_process
        return self.shared_embedding_or_output_weight() if is_copy else None

    @property
    def head_weight(self) -> torch.nn.Parameter:
        """This rank's rows of the head, whether it has a matrix of its own or the embedding's."""
        is_tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight

    def _silence_padding(self, _: torch.nn.Module, __: tuple, output: tuple[Tensor, Tensor | None]) -> None:
        """Padded vocabulary rows must not enter a softmax: their logits become -inf, their gradient zero."""
        output[0][..., self._num_real_columns :] = -torch.inf
