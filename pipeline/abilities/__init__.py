"""General abilities of an edited model, through lm-evaluation-harness."""
