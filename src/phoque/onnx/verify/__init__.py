"""Whether an export runs in Transformers.js: one file a level, and no level is called good that did not run."""
