"""Strict settings: frozen typed models that refuse what they do not know, with words."""

from craton.config.settings import Settings, parse

__all__ = ["Settings", "parse"]
