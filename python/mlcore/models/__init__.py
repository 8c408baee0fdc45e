"""Whole networks: thin assemblies of mlcore.nn with a config on top."""

from . import cnn

__all__ = ["cnn"]
