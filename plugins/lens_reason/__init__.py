"""Reasoners: rewrite a request into a detailed prompt before it is drawn, and search for the system prompt that does so best."""
