"""`--fault`, `--hostile`, `--fault-seed`: what is to go wrong on an embedded host's devices, for those who test drivers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..host.faults.plan import HELP, HOSTILE, SEED_HELP, FaultPlan

FaultOption = Annotated[list[str] | None, typer.Option("--fault", help=HELP, metavar="KIND:TARGET:RATE")]
FaultSeedOption = Annotated[int, typer.Option("--fault-seed", help=SEED_HELP, metavar="N")]
HostileOption = Annotated[
    bool,
    typer.Option("--hostile", help=f"A host that lies about everything now and then: --fault {HOSTILE}."),
]


def fault_plan(faults: list[str] | None, hostile: bool, seed: int) -> FaultPlan:
    """What was ordered. Raises UsageError for the first text that is no fault."""
    return FaultPlan.parse([*(faults or []), *([HOSTILE] if hostile else [])], seed)


def fault_rows(host: Any) -> list[dict[str, Any]]:
    """What the faults of an EmbeddedHost have done, for people and for --json."""
    return [
        {"device": done.device, "flow": done.flow, "fault": done.fault, "seen": done.seen, "hits": done.hits}
        for done in host.fault_counts()
    ]


FAULT_HEADS = ("device", "flow", "fault", "seen", "hit")
