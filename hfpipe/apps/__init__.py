"""Programs around a model: a chat in the terminal."""
