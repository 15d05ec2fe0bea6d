"""Faults to order, for those who test drivers: `plan` (what is ordered), `fate` (whom it hits), `passage`, `relay` and `forger` (how)."""
