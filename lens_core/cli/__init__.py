"""The command line: each command parses, calls one function that scripts can call too, and prints."""
