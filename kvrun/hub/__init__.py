"""Where models come from: aliases, folders, the Hugging Face Hub and its shared cache, package sources."""

from kvrun.hub.catalog import load_catalog
from kvrun.hub.files import ModelFiles
from kvrun.hub.resolve import resolve

__all__ = ["ModelFiles", "load_catalog", "resolve"]
