"""Verify that an export runs in Transformers.js: one file per level; a level that did not run never passes."""
