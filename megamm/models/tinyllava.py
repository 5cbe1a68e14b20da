"""TinyLLaVA: CLIP or SigLIP, small decoders; visual tokens replace the marker. Source: arXiv 2402.14289, 2405.11788."""

from megamm.models.llava_line import family
from megamm.models.llm import llama
from megamm.models.original import Class
from megamm.models.parts import Parts
from megamm.models.vision import clip, siglip

FAMILY = family(
    name="tinyllava",
    parts=Parts(llms=(llama,), visions=(siglip, clip)),
    template="phi",
    classes=(Class(model_type="tiny_llava", architecture="TinyLlavaLlamaForCausalLM", llm=llama),),
)
