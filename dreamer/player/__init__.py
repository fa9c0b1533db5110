"""A person plays inside the world model: the engine, a local server with one page, and dreams rendered to files."""
