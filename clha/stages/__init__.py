"""The stages: each reads artifacts, calls the library and writes an artifact; alone, in the chain, or in a child."""
