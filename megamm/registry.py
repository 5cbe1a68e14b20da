"""Names a user may write -> what they stand for, as dict literals."""

from megamm.errors import ConfigError
from megamm.models import imp, llava, mplug_owl2, tinyllava
from megamm.models.family import Family

FAMILIES: dict[str, Family] = {
    "llava": llava.FAMILY,
    "tinyllava": tinyllava.FAMILY,
    "imp": imp.FAMILY,
    "mplug_owl2": mplug_owl2.FAMILY,
}


def family(name: str) -> Family:
    """The family of that name. Raises ConfigError with the legal names."""
    if name not in FAMILIES:
        raise ConfigError([f"model.family {name!r} is unknown; megamm has: {', '.join(FAMILIES)}"])
    return FAMILIES[name]
