"""LLaVA-1.5: CLIP ViT, linear or MLP, Llama; visual tokens replace the marker. Source: arXiv 2310.03744.

Published in transformers' spelling (models/native.py) and in that of the authors' code (models/original.py).
"""

from megamm.models.llava_line import family
from megamm.models.llm import llama
from megamm.models.original import Class
from megamm.models.parts import Parts
from megamm.models.vision import clip

FAMILY = family(
    name="llava",
    parts=Parts(llms=(llama,), visions=(clip,)),
    template="v1",
    classes=(
        Class(model_type="llava_llama", architecture="LlavaLlamaForCausalLM", llm=llama),
        Class(model_type="llava", architecture="LlavaLlamaForCausalLM", llm=llama),
    ),
)
read, write = FAMILY.read, FAMILY.write
