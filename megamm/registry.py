"""Names a user may write -> what they stand for, as dict literals."""

from megamm.errors import ConfigError
from megamm.models import imp, llava, mplug_owl2, mplug_owl3, tinyllava, vw_lmm
from megamm.models.family import Family

FAMILIES: dict[str, Family] = {
    "llava": llava.FAMILY,
    "mplug_owl3": mplug_owl3.FAMILY,
    "tinyllava": tinyllava.FAMILY,
    "imp": imp.FAMILY,
    "vw_lmm": vw_lmm.FAMILY,
    "vw_lmm_pif": vw_lmm.PIF,
    "mplug_owl2": mplug_owl2.FAMILY,
}


def family(name: str) -> Family:
    """The family of that name. Raises ConfigError with the legal names."""
    if name not in FAMILIES:
        raise ConfigError([f"model.family {name!r} is unknown; megamm has: {', '.join(FAMILIES)}"])
    return FAMILIES[name]
