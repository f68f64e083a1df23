"""Reasoners: rewrite a request into a detailed prompt before it is drawn, and search for the best system prompt."""
