"""A list of modules as one module."""

from collections.abc import Iterable, Iterator

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch.nn import Module


class Modules(MegatronModule):
    """torch's ModuleList, whose parameters megatron-core saves as the slices that they are; in a ModuleList it takes
    every parameter for one that all tensor parallel ranks hold whole."""

    def __init__(self, config: TransformerConfig, modules: Iterable[Module]):
        super().__init__(config=config)
        for i, module in enumerate(modules):
            self.add_module(str(i), module)

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    def __len__(self) -> int:
        return len(self._modules)
