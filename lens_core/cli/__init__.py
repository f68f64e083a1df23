"""The command line: each command parses its arguments, calls one function that scripts can call too, and prints."""
