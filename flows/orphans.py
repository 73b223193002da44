"""Flow runs that the UI shows as Running although their process died: they are set to Crashed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Crashed

from clha.errors import UserError
from clha.store import Busy, Home
from flows import launch, study

_YOUNG = timedelta(seconds=60)  # a flow run that has only just begun may not hold its lock yet


def bury(home: Home) -> list[str]:
    """Set the flow runs of this home to Crashed whose run nobody works on; returns their names.

    The lock of the run, or of its noise study, is the truth: it dies with its owner, which a state in a database does
    not.
    """
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    buried = []
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=running):
            lock = study.locked if client.read_flow(flow_run.flow_id).name == study.NAME else launch.locked
            if _is_dead(home, flow_run, lock):
                client.set_flow_run_state(flow_run.id, Crashed(message="its process died"), force=True)
                buried.append(flow_run.name)
    return buried


def _is_dead(home: Home, flow_run: FlowRun, locked: Callable[[Home, str], AbstractContextManager[None]]) -> bool:
    if flow_run.parameters.get("home") != str(home.root):
        return False
    if flow_run.start_time is None or datetime.now(UTC) - flow_run.start_time < _YOUNG:
        return False
    try:
        # The lock of the run that this process is about to show is its own: who else was at it is gone.
        with locked(home, str(flow_run.parameters.get("run") or flow_run.name)):
            return True
    except Busy:
        return False
    except UserError:
        return True  # no run can have that name
