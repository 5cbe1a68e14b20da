"""The reference variants that climb the ladder: a new one is a line here and a folder in tests/golden."""

from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True, slots=True)
class Variant:
    """A reference model made by its authors' code."""

    path: str
    """FAMILY/VARIANT in tests/golden."""
    dialect: str
    named: str | None = None
    """Its family, where that must be named."""

    @property
    def family(self) -> str:
        """Name in the registry."""
        return self.named or self.path.split("/")[0]

    @property
    def hf(self) -> Path:
        """Its Hugging Face directory."""
        return GOLDEN / self.path / "hf"

    @property
    def tower(self) -> Path | None:
        """The directory of its tower, where its config.json leaves the tower's sizes out."""
        tower = self.hf / "vision_tower"
        is_needed = tower.is_dir() and not self.path.startswith("imp/")  # Imp's config.json has the sizes, too
        return tower if is_needed else None

    @property
    def cases(self) -> list[Path]:
        """Its reference cases."""
        return sorted((GOLDEN / self.path / "cases").glob("*.npz"))


VARIANTS = [
    Variant("imp/phi2", "original"),
    Variant("imp/phi2_legacy", "legacy"),
    Variant("imp/phi3", "original"),
    Variant("imp/qwen1_5", "original"),
    Variant("mplug_owl3/240728", "original"),
    Variant("mplug_owl3/241101", "original"),
    Variant("tinyllava/phi2", "original"),
    Variant("tinyllava/stablelm2", "original"),
    Variant("tinyllava/tinyllama", "original"),
    Variant("tinyllava/factory_phi2", "factory"),
    Variant("tinyllava/factory_qwen2", "factory"),
    Variant("vw_lmm/llama", "original"),
    Variant("vw_lmm/mistral", "original"),
    Variant("vw_lmm/pif", "original", named="vw_lmm_pif"),
    Variant("mplug_owl2/llama", "original"),
]
