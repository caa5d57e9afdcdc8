"""The historical import path of all public names of :mod:`open_mythos`."""

from open_mythos import __all__, __dir__, __getattr__  # noqa: F401
