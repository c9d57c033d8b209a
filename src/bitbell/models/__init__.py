"""Presets of well-kept libraries' architectures; no model code of our own."""

from bitbell.models.images import IMAGE_PRESETS, ImagePreset
from bitbell.models.presets import PRESETS, Preset, build_model, find_preset, preset_config

__all__ = ["IMAGE_PRESETS", "PRESETS", "ImagePreset", "Preset", "build_model", "find_preset", "preset_config"]
