"""What is measured on ordinary text: second moments, states, causal traces."""
