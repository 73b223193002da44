"""CLHA: align a language model with ranked human preferences, without reinforcement learning."""

__version__ = "0.1.0"

__all__ = ["ClhaConfig", "ClhaTrainer", "__version__"]


def __getattr__(name: str) -> object:
    """`from clha import ClhaConfig, ClhaTrainer`, loaded when asked for: `import clha` alone stays light."""
    if name == "ClhaTrainer":
        from clha.training.trainer import ClhaTrainer

        return ClhaTrainer
    if name == "ClhaConfig":
        from clha.training.arguments import ClhaConfig

        return ClhaConfig
    raise AttributeError(f"module 'clha' has no attribute {name!r}")
