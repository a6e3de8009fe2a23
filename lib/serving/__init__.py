"""Cog from outside: the input schema, a local server, and the client that script/ uses."""
