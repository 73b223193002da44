"""Stage evaluate: both policies answer the test prompts (`answers.*`), and reward models judge them (`evaluate`)."""

from clha.stages.work import Work
from clha.store import Artifact, kind_of

CODE_VERSION = {"answers": 3, "evaluate": 6}


def build(work: Work) -> Artifact:
    """Build one node of this stage."""
    if kind_of(work.node) == "answers":
        from clha.stages.evaluate_answers import build_answers

        return build_answers(work)
    from clha.stages.evaluate_scores import build_scores

    return build_scores(work)
