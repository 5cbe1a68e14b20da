"""Vision towers: one trunk, and a table and options per published tower."""
