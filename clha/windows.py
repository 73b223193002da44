"""How far back the attention of a model sees, by its configuration."""

from typing import Any


def layer_windows(config: Any) -> list[int | None]:
    """How many keys each layer's attention sees at most, its own among them; None for all."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
