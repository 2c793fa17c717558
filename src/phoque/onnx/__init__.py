"""Export a merged model to a folder that Transformers.js can run, and verify the export."""
