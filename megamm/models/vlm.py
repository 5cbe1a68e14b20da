"""The model: encode, project, place, decode. No family names in here.

One `VLM` is one virtual stage of one pipeline rank: whatever run of the flat unit list the layout gives it. Exactly one
3-dimensional tensor crosses a stage boundary: vision hidden states [P, I, hv] inside the tower, visual tokens [P, I, H]
behind the projector, hidden states [S, B, H] inside the llm (S divided by tp under sequence parallelism), with the
visual tokens as further rows behind them (parallel/carry.py) where a later unit reads these.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.nn import Parameter

from megamm.batch import IMAGE, Batch
from megamm.config.schema import Loss
from megamm.models.layers.modality_adaptive import is_visual
from megamm.models.layers.recompute import keep_gradient_path
from megamm.models.layers.visual_words import VisualWords, gather_rows
from megamm.models.llm.decoder import Decoder
from megamm.models.options import VlmOptions
from megamm.models.projector.abstractor_layers import Abstractor
from megamm.models.projector.layers import Projector
from megamm.models.projector.resampler_layers import Resampler
from megamm.models.spec import PartConfigs
from megamm.models.vision.vit import VisionTower, select_features
from megamm.parallel import carry
from megamm.parallel.placement import Stage


def packed_seq_params(batch: Batch) -> PackedSeqParams | None:
    """Which tokens of a packed row see each other, as megatron-core wants to know it; None for rows of one sample."""
    if batch.cu_seqlens is None:
        return None
    bounds, longest = batch.cu_seqlens, batch.max_seqlen
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


class VLM(MegatronModule):
    """The units of one stage, called with a whole `Batch`; every stage takes from it what its units need."""

    # megatron-core's schedules and gradient reductions ask for these.
    model_type = ModelType.encoder_or_decoder
    share_embeddings_and_output_weights = False

    def __init__(self, options: VlmOptions, configs: PartConfigs, stage: Stage, loss: Loss):
        super().__init__(config=configs.llm)
        self.options = options
        self.stage = stage
        self.loss = loss
        self.vp_stage = stage.vp_stage if configs.llm.virtual_pipeline_model_parallel_size else None
        self.pre_process = not stage.earlier
        self.post_process = not stage.later
        self.vision: VisionTower | None = None
        self.projector: Projector | Abstractor | Resampler | None = None
        self.llm: Decoder | None = None
        if stage.has("vision.embed") or stage.vision_layers:
            self.vision = VisionTower(options.vision, options.image, configs.vision, stage)
        if stage.has("projector"):
            if options.projector.kind == "abstractor":
                self.projector = Abstractor(options.projector, configs.projector, options.vision.num_features)
            elif options.projector.num_queries:
                self.projector = Resampler(options.projector, configs.projector)
            else:
                self.projector = Projector(options.projector, configs.projector)
        if stage.has("llm.embed") or stage.llm_layers or stage.has("llm.head"):
            self.llm = Decoder(options.llm, self.config, stage)
        self.words: VisualWords | None = None
        if any(options.reads_words(unit.name) for unit in stage.units):
            self._add_words(configs)
        self.sends_gradient = bool(stage.earlier)
        """Whether something in front of this stage is trained and waits for a gradient; `parameters.freeze` sets it."""
        self._received: Any = None
        self._reads_features = any(options.reads_features(unit.name) for unit in stage.units)
        self._sends_features = any(options.reads_features(unit.name) for unit in stage.later)

    def _add_words(self, configs: PartConfigs) -> None:
        """The head of visual words; marked as `Decoder` marks a tied embedding where another stage has a copy."""
        homes = [name for name in ("llm.embed", "llm.head") if self.options.reads_words(name)]
        has_all = all(self.stage.has(name) for name in homes)
        is_copy = not self.stage.has(homes[0])
        self.words = VisualWords(self.options.llm, configs.projector, is_copy)
        if not has_all:
            self.words.vm_head.weight.shared_embedding = True
            self.words.vm_head.weight.shared = is_copy
        self._ties_words = not has_all

    @property
    def tied_copies(self) -> dict[str, Parameter]:
        """Weights of which another stage has a copy, too, by a name that is the same there. Both copies live where
        `llm.embed` and `llm.head` do, and train on the sum of their gradients."""
        copies = {}
        if self.llm is not None and self.llm.tied_copy is not None:
            copies["embedding"] = self.llm.tied_copy
        if self.words is not None and self._ties_words:
            copies["words"] = self.words.vm_head.weight
        return copies

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take what the stage before sent; called by megatron-core's schedules ahead of every forward."""
        received = input_tensor[0]
        if received is None or self.sends_gradient or not torch.is_grad_enabled():
            self._received = received
            return
        # Nobody in front is trained, yet the stage before waits for the gradient of what it sent. Cut the graph here
        # and let the schedule find one zero to send back.
        self._received = received.detach()
        received.data = received.new_zeros(1, 1, 1)
        received.grad = received.new_zeros(1, 1, 1)

    def forward(self, batch: Batch, keep_logits: bool = False) -> Tensor:
        """Run this stage.

        Returns what crosses the boundary, or on the stage of `llm.head` the loss of every position, float32 [B, S], not
        masked; with visual words [2, B, S], behind the cross-entropy the divergence. With `keep_logits` the logits
        [B, S, V / tp] instead.
        """
        x = self._received
        if self.vision is not None:
            x = self.vision(batch.pixels_I3HW if self.vision.has_embedding else x)
        if self.projector is not None:
            x = self.projector(select_features(x, self.options.vision))
        if self.llm is not None:
            features_R1H: Tensor | None = None
            if self.stage.has("llm.embed"):
                if self._reads_features or self._sends_features:
                    features_R1H = self.flatten_features(x)
                if self.options.has_pseudo_features and self.words is not None:
                    x = self.words.pseudo_features(x, self.llm.embedding.word_embeddings.weight, self.words.log_words)
                x = self.place(x, batch)
            elif self._reads_features or self._sends_features:
                x, features_R1H = carry.unpack(x, self.local_length(batch), batch.ids_BS.size(0))
            x = self.decode(x, features_R1H, batch, keep_logits)
            return carry.pack(x, features_R1H) if self._sends_features and features_R1H is not None else x
        return make_viewless_tensor(x, requires_grad=x.requires_grad, keep_graph=True)

    def place(self, visual_PIH: Tensor, batch: Batch) -> Tensor:
        """Embed the ids and write each visual token where its IMAGE id stands -> [S, B, H], scattered under sequence
        parallelism. A visual token that is placed nowhere gets a zero gradient, so nothing goes missing."""
        assert self.llm is not None
        ids_BS = batch.ids_BS.masked_fill(batch.ids_BS == IMAGE, 0)
        text_SBH = self.llm.embedding(input_ids=ids_BS, position_ids=batch.positions_BS)
        length, size, width = text_SBH.shape
        rows_KH = visual_PIH.transpose(0, 1).reshape(-1, width)[batch.rows_K]
        x_BSH = text_SBH.transpose(0, 1).reshape(-1, width).index_copy(0, batch.slots_K, rows_KH)
        x_SBH = x_BSH.view(size, length, width).transpose(0, 1).contiguous()
        return scatter_to_sequence_parallel_region(x_SBH) if self.config.sequence_parallel else x_SBH

    def flatten_features(self, visual_PIH: Tensor) -> Tensor:
        """Visual tokens [P, I, H] as rows [R, 1, H], image after image, as `Batch.rows_K` counts them. Under sequence
        parallelism padded with zeros to a multiple of tp, and scattered like the hidden states; in FP8, whose linears
        want that, every rank's share padded to a multiple of 16."""
        rows_R1H = visual_PIH.transpose(0, 1).reshape(-1, 1, visual_PIH.size(-1))
        is_scattered = self.config.sequence_parallel
        shares = self.config.tensor_model_parallel_size if is_scattered else 1
        padding = -rows_R1H.size(0) % (shares * (16 if self.config.fp8 else 1))
        rows_R1H = F.pad(rows_R1H, (0, 0, 0, 0, 0, padding)) if padding else rows_R1H
        return scatter_to_sequence_parallel_region(rows_R1H) if is_scattered else rows_R1H

    def local_length(self, batch: Batch) -> int:
        """S of the hidden states on this rank."""
        tp = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return batch.ids_BS.size(1) // tp

    def decode(self, x_SBH: Tensor, features_R1H: Tensor | None, batch: Batch, keep_logits: bool) -> Tensor:
        """The llm's layers of this stage, and head and loss where they live here."""
        assert self.llm is not None
        x_SBH = keep_gradient_path(x_SBH, self.llm.decoder)
        if not self.llm.pre_process:
            self.llm.set_input_tensor(x_SBH)
        side: dict[str, Tensor] = {}
        if self.options.llm.hyper is not None and self._reads_features:
            assert features_R1H is not None
            side = {"context": features_R1H, "context_mask": batch.starts_BM}
        elif self.options.llm.is_modality_adaptive:
            side["context_mask"] = is_visual(batch)
        arguments: dict[str, Any] = dict(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=x_SBH if self.llm.pre_process else None,
            labels=None if keep_logits else batch.targets_BS.clamp(min=0),
            packed_seq_params=packed_seq_params(batch),
            extra_block_kwargs=side,
        )
        if self.words is None or keep_logits or not self.llm.post_process:
            return self.llm(**arguments)
        assert features_R1H is not None
        hidden: list[Tensor] = []
        hook = self.llm.decoder.register_forward_hook(lambda _, __, output: hidden.append(output))
        loss_BS = self.llm(**arguments)
        hook.remove()
        is_watched_only = self.loss.vm_weight == 0 and not self.words.vm_head.weight.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_watched_only):
            rows = [gather_rows(x) if self.config.sequence_parallel else x for x in (features_R1H, *hidden)]
            kl_BS = self.words(rows[0].squeeze(1), rows[1], self.llm.head_weight, batch, self.loss)
        return torch.stack([loss_BS, kl_BS])
