"""BAR 0 of the PCI personality: how a driver finds and starts the admin ring, and where it rings doorbells.

| offset | bits | access | name | meaning |
|---|---|---|---|---|
| 0x00 | 32 | r | MAGIC | "VMBS" |
| 0x04 | 32 | r | LAYOUT | 1: this table |
| 0x08 | 32 | r | FEATURES | 0 |
| 0x0c | 32 | r | CHANNELS | doorbells: relids are below this number |
| 0x10 | 32 | r | VECTORS | MSI-X vectors; vector 0 is the admin ring's |
| 0x14 | 32 | r | MAX_ADMIN_PAGES | pages of the admin ring pair, at most |
| 0x20 | 32 | r | STATUS | bit 0 the admin ring runs, bit 1 it failed (see ERROR); never both, and neither after a reset |
| 0x24 | 32 | w | CONTROL | 1: start the admin ring (if it runs, it fails); 2: reset the function |
| 0x28 | 32 | r | ERROR | why it failed: ERROR_* |
| 0x30 | 64 | rw | ADMIN_IOVA | the admin ring pair: driver-to-host ring, behind it host-to-driver ring; page aligned |
| 0x38 | 32 | rw | ADMIN_UPSTREAM | pages of the driver-to-host ring, its control page included |
| 0x3c | 32 | rw | ADMIN_DOWNSTREAM | pages of the host-to-driver ring, likewise |
| 0x1000 + 4 n | 32 | w | DOORBELL n | any value: look at the ring of channel n; 0 is the admin ring |

Registers are little-endian. An access has 32 bits, or 64 where aligned to them: that is two of 32 bits, the lower one first.
Everything else reads as zero and ignores writes. When the admin ring fails vector 0 is signalled, and nothing of the driver's memory is
in use any more; taking memory back (an unmap) that the ring, a GPADL or an open channel uses makes it fail, too.
"""

MAGIC = int.from_bytes(b"VMBS", "little")
LAYOUT = 1

REG_MAGIC = 0x00
REG_LAYOUT = 0x04
REG_FEATURES = 0x08
REG_CHANNELS = 0x0C
REG_VECTORS = 0x10
REG_MAX_ADMIN_PAGES = 0x14
REG_STATUS = 0x20
REG_CONTROL = 0x24
REG_ERROR = 0x28
REG_ADMIN_IOVA = 0x30
REG_ADMIN_UPSTREAM = 0x38
REG_ADMIN_DOWNSTREAM = 0x3C
REG_DOORBELLS = 0x1000

BAR0_SIZE = 0x2000
CHANNELS = 128
VECTORS = 65
MAX_ADMIN_PAGES = 64

STATUS_RUNNING = 1
STATUS_FAILED = 2

CONTROL_START = 1
CONTROL_RESET = 2

ERROR_NONE = 0
ERROR_ADMIN_SIZE = 1
ERROR_ADMIN_MEMORY = 2
ERROR_PROTOCOL = 3
ERROR_RUNNING = 4
ERROR_GONE = 5

ERRORS = {
    ERROR_NONE: "none",
    ERROR_ADMIN_SIZE: "the admin ring's sizes are out of range",
    ERROR_ADMIN_MEMORY: "the admin ring's memory is not page aligned, not mapped for reading and writing, or was unmapped",
    ERROR_PROTOCOL: "a message or the ring itself broke the protocol",
    ERROR_RUNNING: "the admin ring was started while it was running",
    ERROR_GONE: "the host ends",
}
