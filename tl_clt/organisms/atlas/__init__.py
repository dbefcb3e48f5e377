"""The "atlas" organism: a tiny language model that knows US geography and composes two facts at a time."""
