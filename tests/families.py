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

    @property
    def family(self) -> str:
        """Name in the registry."""
        return self.path.split("/")[0]

    @property
    def hf(self) -> Path:
        """Its Hugging Face directory."""
        return GOLDEN / self.path / "hf"

    @property
    def tower(self) -> Path | None:
        """The directory of its tower, where its config.json leaves the tower's sizes out."""
        is_apart = self.dialect == "original" and not self.path.startswith(("imp/", "mplug_owl2/"))
        return self.hf / "vision_tower" if is_apart else None

    @property
    def cases(self) -> list[Path]:
        """Its reference cases."""
        return sorted((GOLDEN / self.path / "cases").glob("*.npz"))


VARIANTS = [
    Variant("imp/phi2", "original"),
    Variant("imp/phi2_legacy", "legacy"),
    Variant("imp/phi3", "original"),
    Variant("imp/qwen1_5", "original"),
    Variant("tinyllava/phi2", "original"),
    Variant("tinyllava/stablelm2", "original"),
    Variant("tinyllava/tinyllama", "original"),
    Variant("tinyllava/factory_phi2", "factory"),
    Variant("tinyllava/factory_qwen2", "factory"),
    Variant("mplug_owl2/llama", "original"),
]
