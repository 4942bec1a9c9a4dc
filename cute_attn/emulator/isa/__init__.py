"""The instruction set, one file per family: every module of this package registers what it implements.

A new family is a new file.
"""

from importlib import import_module
from pkgutil import iter_modules

FAMILIES = tuple(import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
