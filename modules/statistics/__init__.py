"""Statistics of a model on text: second moments of keys, states of modules, causal traces."""
