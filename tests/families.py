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
    def cases(self) -> list[Path]:
        """Its reference cases."""
        return sorted((GOLDEN / self.path / "cases").glob("*.npz"))


VARIANTS = [
    Variant("imp/phi2", "original"),
    Variant("imp/phi2_legacy", "legacy"),
    Variant("imp/phi3", "original"),
    Variant("imp/qwen1_5", "original"),
]
