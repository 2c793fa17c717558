"""From a merged model to a folder that Transformers.js runs, and the checks that say whether it does."""
