"""A language model: text and tokens, structure, active edits, and what is computed once."""
