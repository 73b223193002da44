"""Stage evaluate: both policies answer the test prompts (`answers.*`), and reward models judge them (`evaluate`)."""

from clha.stages.work import Work
from clha.store import Artifact, kind_of

CODE_VERSION = {"answers": 1, "evaluate": 1}


def build(work: Work) -> Artifact:
    """Build one node of this stage."""
    if kind_of(work.node) == "answers":
        from clha.evaluation.answers import build_answers

        return build_answers(work)
    from clha.evaluation.scoring import build_scores

    return build_scores(work)


if __name__ == "__main__":
    from clha.stages.work import child_main

    child_main(build)
