"""What a stage's build function gets: its inputs, settings and models, and the writer of its artifact."""

import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clha.digests import digest_of
from clha.errors import UserError
from clha.progress import Progress
from clha.settings import Settings
from clha.store import Artifact, ArtifactWriter, Home
from clha.versions import installed_versions


@dataclass(frozen=True)
class Work:
    """One node to build: where its inputs lie and where its output goes."""

    home: Home
    run: str
    node: str
    settings: Settings
    parts: Mapping[str, Any]  # the parts of the key
    inputs: Mapping[str, Artifact]
    models: Mapping[str, Path]  # role -> model folder
    writer: ArtifactWriter
    progress: Progress

    def finish(self, *, rows_in: int, rows_out: int, seed: int | None, device: str, **facts: Any) -> Artifact:
        """Complete the artifact with the manifest fields that are the same for every node.

        `facts` are the node's own manifest fields (tokens per second, ...). Raises StageFailure when
        rows_in != rows_out + quarantined.
        """
        parts = dict(self.parts)
        return self.writer.finish(
            rows_in=rows_in,
            rows_out=rows_out,
            facts={
                "node": self.node,
                "code_version": parts["code_version"],
                "inputs": {name: a.key for name, a in self.inputs.items()},
                "settings": parts["settings"],
                "key_parts": parts,
                "versions": {**installed_versions(), **parts["versions"]},
                "seed": seed,
                "device": device,
                "peak_memory_bytes": peak_memory_bytes(),
                **facts,
            },
        )

    def check_quarantine(self, rows_in: int, share: float, setting: str) -> None:
        """Raises UserError when more than `share` of the rows were quarantined, naming the commonest reason."""
        counts = self.writer.quarantined()
        bad = sum(counts.values())
        if rows_in and bad > share * rows_in:
            reason = max(counts, key=lambda r: counts[r])
            rows = self.writer.read("quarantine").to_pylist()
            first = next(row["detail"] for row in rows if row["reason"] == reason)
            raise UserError(
                f"{self.node}: {bad} of {rows_in} rows are bad (most: {reason}, first: {first}), more than {setting} = "
                f"{share:g}; see {self.writer.folder}/quarantine-*.parquet, mend the data or raise {setting}"
            )


def find_or_make(
    home: Home, parts: Mapping[str, Any], inputs: Mapping[str, str], make: Callable[[ArtifactWriter], dict[str, Any]]
) -> Artifact:
    """An artifact that is no node of the chain: the finished one with these parts of the key, or a new one.

    Args:
        home: where it lies.
        parts: what it is made from: kind, code_version, settings, ...
        inputs: {node: key} for its manifest.
        make: writes its files and returns facts for the manifest, `rows` among them.
    """
    from clha.rewards.adapters import scoring_device

    kind, key = parts["kind"], digest_of(parts)[:24]
    with home.lock(f"{kind}-{key}", wait_seconds=-1):  # without end: execution.timeout_minutes ends who waits too long
        done = home.find(kind, key)
        if done and done.damage(deep=True) is None:
            return done
        writer = ArtifactWriter(home, kind, key)
        facts = make(writer)
        rows = facts.pop("rows")
        return writer.finish(
            rows_in=rows,
            rows_out=rows,
            facts={
                "node": kind,
                "code_version": parts["code_version"],
                "inputs": dict(inputs),
                "settings": parts["settings"],
                "key_parts": dict(parts),
                "versions": installed_versions(),
                "seed": parts["settings"].get("seed"),
                "device": scoring_device(),
                "peak_memory_bytes": peak_memory_bytes(),
                **facts,
            },
        )


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
