"""Features of responses, an artifact of its own: made in the process that needs them, found again by the next one.

Its key holds what the features depend on (the responses in their order, the encoder and how it is read), not what
becomes of them: fits with other settings of the head, and the noise study, read what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clha.digests import digest_of
from clha.progress import Progress
from clha.schema import SCHEMA_VERSION
from clha.stages.work import find_or_make
from clha.store import Artifact, ArtifactWriter, Home
from clha.versions import package_version

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from clha.rewards.texts import RewardInput
    from clha.settings_rewards import RewardFit

# Keys of fits and of study cells do not hold it: whoever raises it raises those of fit_reward and noise_* too.
CODE_VERSION = {"features": 4}


@dataclass(frozen=True)
class StoredFeatures:
    """values [N, D] (float32 precision; NaN for what cannot be read), truncated [N], and the artifact they lie in."""

    values: NDArray[np.float64]
    truncated: NDArray[np.bool_]
    key: str | None  # null where there were no responses


@dataclass(frozen=True)
class Reader:
    """The encoder that reads responses: its folder, the digest of its files, and the settings that say how."""

    encoder: Path
    digest: str
    fit: RewardFit


def features_of(
    home: Home, prepare: Artifact, reader: Reader, items: Sequence[RewardInput], progress: Progress
) -> StoredFeatures:
    """Features of responses to prompts of `prepare`, computed in shards of `fit.shard_size` where they are not there.

    Raises UserError when the encoder has no such layer.
    """
    if not items:
        return StoredFeatures(np.empty((0, 1)), np.empty(0, dtype=bool), None)
    fit = reader.fit
    parts = {
        "kind": "features",
        "schema_version": SCHEMA_VERSION,
        "code_version": CODE_VERSION["features"],
        "responses": digest_of([digest_of([list(i.messages), i.response]) for i in items]),
        "models": {"encoder": reader.digest},
        "settings": {name: getattr(fit, name) for name in ("layer", "pooling", "max_tokens", "shard_size")},
        "versions": {name: package_version(name) for name in ("torch", "transformers")},
    }
    made = []

    def make(writer: ArtifactWriter) -> dict[str, Any]:
        made.append(writer.key)
        return _compute(writer, reader, items, progress)

    artifact = find_or_make(home, parts, {"prepare": prepare.key}, make)
    progress.log(f"features of {len(items)} responses: {'computed' if made else 'found'}, {artifact.key}")
    table = artifact.read("features")
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in table["values"].chunks])
    truncated = table["truncated"].to_numpy()
    return StoredFeatures(values.reshape(len(items), -1).astype(float), truncated, artifact.key)


def _compute(
    writer: ArtifactWriter, reader: Reader, items: Sequence[RewardInput], progress: Progress
) -> dict[str, Any]:
    """Write the shards that are not there yet; returns facts of the manifest."""
    from clha.rewards.adapters import scoring_device
    from clha.rewards.features import FrozenEncoder
    from clha.rewards.scoring import report_to

    fit, encoder = reader.fit, None
    for index, start in enumerate(range(0, len(items), fit.shard_size)):
        batch = items[start : start + fit.shard_size]
        if not writer.has_shard("features", index):
            encoder = encoder or FrozenEncoder(
                reader.encoder,
                layer=fit.layer,
                pooling=fit.pooling,
                max_tokens=fit.max_tokens,
                device=scoring_device(),
            )
            report = report_to(progress, len(items), "responses", start)
            read = encoder.features(batch, tokens_per_batch=fit.tokens_per_batch, progress=report)
            flat = pa.array(read.values.astype(np.float32).reshape(-1))  # what the encoder computed: nothing is lost
            values = pa.FixedSizeListArray.from_arrays(flat, read.values.shape[1])
            writer.write_shard("features", index, pa.table({"values": values, "truncated": read.truncated}))
        progress.update(start + len(batch), len(items), "responses")
    # Of this attempt: a resumed one computes fewer.
    return {"rows": len(items), "padding_fraction": encoder.padding.fraction if encoder else 0.0}
