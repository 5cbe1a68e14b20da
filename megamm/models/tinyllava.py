"""TinyLLaVA: a small decoder, CLIP or SigLIP, and one of several projectors. Source: arXiv 2402.14289 and 2405.11788.

Its first generation, TinyLLaVA Bench, writes LLaVA's spelling (models/original.py), keeps every patch of SigLIP and has
no bias on Phi-2's head. TinyLLaVA_Factory writes a spelling of its own (models/factory.py), loses SigLIP's first patch
and keeps that bias.
"""

from megamm.models.llava_line import family, in_factory
from megamm.models.llm import llama, phi2, qwen2, stablelm2
from megamm.models.original import Class
from megamm.models.parts import Parts
from megamm.models.vision import clip, siglip

PARTS = Parts(
    llms=(llama, phi2, stablelm2, qwen2),
    visions=(clip, siglip),
    projectors=("linear", "mlpNx_gelu", "resampler"),
)

FAMILY = family(
    name="tinyllava",
    parts=PARTS,
    template="phi",
    classes=(
        Class(
            model_type="tiny_llava_phi",
            architecture="TinyLlavaPhiForCausalLM",
            llm=phi2,
            always={"has_head_bias": False},
        ),
        Class(model_type="tiny_llava_stablelm", architecture="TinyLlavaStablelmForCausalLM", llm=stablelm2),
        Class(model_type="tiny_llava", architecture="TinyLlavaLlamaForCausalLM", llm=llama),
    ),
    more={"factory": in_factory("tinyllava", PARTS)},
    starts_in="factory",
)
