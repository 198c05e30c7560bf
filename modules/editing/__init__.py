"""Editors and active edits: weight updates, adapters, memories of text."""
