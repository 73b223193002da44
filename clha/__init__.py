"""CLHA: align a language model with ranked human preferences, without reinforcement learning."""

__version__ = "0.1.0"
