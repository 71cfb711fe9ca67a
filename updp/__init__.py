"""updp makes vision networks shallower: prune blocks, train progressively, merge exactly.

The public names below are loaded on first use, so that ``import updp`` costs nothing::

    import updp

    spec = updp.load_spec("path/to/spec.yaml")
    supernet = updp.build_supernet(spec)
    merged, certificate = updp.merge(supernet)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from updp.allowed import allow_modules as allow_modules
    from updp.artefact import load as load
    from updp.artefact import verify as verify
    from updp.certificate import merge as merge
    from updp.deployment import deploy as deploy
    from updp.exporting import export as export
    from updp.spec import list_specs as list_specs
    from updp.spec import load_spec as load_spec
    from updp.subnet import SubnetConfig as SubnetConfig
    from updp.subnet import list_subnets as list_subnets
    from updp.subnet import load_subnet as load_subnet
    from updp.supernet import build_supernet as build_supernet

# Public name -> the module that defines it (PEP 562).
_HOMES = {
    "SubnetConfig": "updp.subnet",
    "allow_modules": "updp.allowed",
    "build_supernet": "updp.supernet",
    "deploy": "updp.deployment",
    "export": "updp.exporting",
    "list_specs": "updp.spec",
    "list_subnets": "updp.subnet",
    "load": "updp.artefact",
    "load_spec": "updp.spec",
    "load_subnet": "updp.subnet",
    "merge": "updp.certificate",
    "verify": "updp.artefact",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use and keep it."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
