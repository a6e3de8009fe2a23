"""Everything that touches Cog: input schema, a local server, and the client that script/ calls."""
