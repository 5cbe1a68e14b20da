"""Layers and helpers that several parts share."""
