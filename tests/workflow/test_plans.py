"""ldm/workflow/plans.py: which steps a plan's record calls outdated."""

from ldm.workflow.plans import Plan, PlanRecord, PlanStep


def test_a_cell_is_outdated_once_its_generator_was_made_anew() -> None:
    made, cell = PlanStep("train", "python train"), PlanStep("cell", "python cell")
    record = PlanRecord(Plan("p", "nowhere", (made, cell)))
    assert not record.outdated(cell, [made])  # nothing is known of it
    entries = {
        step.name: {"fingerprint": step.fingerprint, "finished": f"2026-01-0{day}"}
        for step, day in ((made, 1), (cell, 2))
    }
    record.entries = entries
    assert not record.outdated(cell, [made])
    entries["train"]["finished"] = "2026-01-03"
    assert record.outdated(cell, [made])
    entries["train"] |= {"finished": "2026-01-01", "fingerprint": "other settings"}
    assert record.outdated(cell, [made])
