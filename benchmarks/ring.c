/* The yardstick of ring/: a VMBus ring in lean C, two processes on two cores, payload copied in and copied out.
 *
 *     ring CORE CORE SIZE BURST PACKETS
 *
 * prints million packets a second. SIZE is the payload's bytes, BURST how many packets the write index is shown for.
 *
 * It does what the project's kernels do: descriptor, payload, footer; the write index with release order, a full barrier, then the
 * interrupt mask and the read index; on the other side one load of a descriptor's first word and all checks on that copy; the read
 * index with release order, a full barrier, then pending_send_sz. Indices of the peer are checked whenever they are read, and
 * read only when the room or the packets known so far are used up. Both rest as long between two looks, both give space back
 * by the same rule, both map the data area twice in a row. What the project does on its own: an exchange where this has a store
 * and a fence, and asking for the cache lines ahead.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, DATA = 512 * PAGE, HEADER = 16, FOOTER = 8, BURST_MAX = 32, INBAND = 6, SLOT = 2048 };

struct control {
	_Atomic uint32_t write, read, mask, pending;
	uint32_t reserved[12];
	_Atomic uint32_t features;
};

struct ring {
	struct control *control;
	char *data;
	uint32_t size, index, shown, room;
	uint64_t packets, bytes, signals;
	int broken;
};

struct row {
	uint64_t offset, length, trans_id;
	uint16_t kind, flags;
	uint32_t header;
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Between two looks at an index that has not moved: each look takes the line away from the side that works on it. */
static void rest(void)
{
	for (int at = 0; at < 32; at++) {
#if defined(__x86_64__)
		__builtin_ia32_pause();
#else
		__asm__ volatile("yield");
#endif
	}
}

/* Short copies inline, two overlapping blocks at the end; long ones by the library, which knows the machine best. */
static inline void copy(char *restrict to, const char *restrict from, size_t size)
{
	if (size > 512) {
		memcpy(to, from, size);
	} else if (size >= 64) {
		for (size_t at = 0; at < size - 64; at += 64)
			__builtin_memcpy(to + at, from + at, 64);
		__builtin_memcpy(to + size - 64, from + size - 64, 64);
	} else {
		for (size_t at = 0; at < size; at += 8)
			__builtin_memcpy(to + at, from + at, 8);
	}
}

static inline int bad(const struct ring *ring, uint32_t index)
{
	return index >= ring->size || (index & 7);
}

static inline uint32_t look_for_room(struct ring *ring)
{
	uint32_t read = atomic_load_explicit(&ring->control->read, memory_order_acquire);
	if (bad(ring, read)) {
		ring->broken = 1;
		return ring->room = 0;
	}
	ring->room = read > ring->index ? read - ring->index : read - ring->index + ring->size;
	return ring->room;
}

static inline uint32_t look_for_packets(struct ring *ring)
{
	uint32_t write = atomic_load_explicit(&ring->control->write, memory_order_acquire);
	if (bad(ring, write)) {
		ring->broken = 1;
		return ring->room = 0;
	}
	ring->room = write >= ring->index ? write - ring->index : write - ring->index + ring->size;
	return ring->room;
}

static inline void advance(struct ring *ring, uint32_t total)
{
	uint32_t index = ring->index + total;
	ring->index = index >= ring->size ? index - ring->size : index;
	ring->room -= total;
	ring->packets++;
	ring->bytes += total;
}

static int send_burst(struct ring *ring, const char *memory, const struct row *rows, int count)
{
	int sent = 0;
	uint32_t before = ring->shown;

	for (; sent < count; sent++) {
		const struct row *row = &rows[sent];
		uint64_t length = row->header + ((row->length + 7) & ~7ull);
		uint32_t total = length + FOOTER;
		if (ring->room <= total && (ring->broken || look_for_room(ring) <= total))
			break;
		char *place = ring->data + ring->index;
		*(uint64_t *)place = row->kind | (uint64_t)row->header << 13 | length << 29 | (uint64_t)row->flags << 48;
		*(uint64_t *)(place + 8) = row->trans_id;
		copy(place + row->header, memory + row->offset, row->length);
		*(uint64_t *)(place + length) = (uint64_t)ring->index << 32;
		advance(ring, total);
	}
	if (!sent)
		return 0;
	ring->shown = ring->index;
	atomic_store_explicit(&ring->control->write, ring->index, memory_order_release);
	atomic_thread_fence(memory_order_seq_cst);
	if (!atomic_load_explicit(&ring->control->mask, memory_order_relaxed) &&
	    atomic_load_explicit(&ring->control->read, memory_order_acquire) == before)
		ring->signals++;
	return sent;
}

static void commit(struct ring *ring)
{
	uint32_t before = ring->shown;

	ring->shown = ring->index;
	atomic_store_explicit(&ring->control->read, ring->index, memory_order_release);
	atomic_thread_fence(memory_order_seq_cst);
	uint32_t pending = atomic_load_explicit(&ring->control->pending, memory_order_relaxed);
	if (!pending || !(atomic_load_explicit(&ring->control->features, memory_order_relaxed) & 1))
		return;
	uint32_t write = atomic_load_explicit(&ring->control->write, memory_order_acquire);
	if (bad(ring, write)) {
		ring->broken = 1;
		return;
	}
	uint32_t free = ring->index > write ? ring->index - write : ring->index - write + ring->size;
	uint32_t freed = ring->index >= before ? ring->index - before : ring->index - before + ring->size;
	if (free > pending && free - freed <= pending)
		ring->signals++;
}

static inline uint32_t held(const struct ring *ring)
{
	return ring->index >= ring->shown ? ring->index - ring->shown : ring->index - ring->shown + ring->size;
}

static int receive_burst(struct ring *ring, char *memory, struct row *rows, int count)
{
	int received = 0;
	uint64_t used = 0;

	for (; received < count; received++) {
		if (!ring->room && (ring->broken || !look_for_packets(ring)))
			break;
		char *place = ring->data + ring->index;
		uint64_t word = atomic_load_explicit((_Atomic uint64_t *)place, memory_order_relaxed);
		uint32_t length = (word >> 32 & 0xFFFF) * 8, header = (word >> 16 & 0xFFFF) * 8;
		if (length < HEADER || length + FOOTER > ring->room || header < HEADER || header > length) {
			ring->broken = 1;
			ring->room = 0;
			break;
		}
		copy(memory + used, place + HEADER, length - HEADER);
		rows[received] = (struct row){
			.offset = used + header - HEADER,
			.length = length - header,
			.trans_id = *(uint64_t *)(place + 8),
			.kind = word & 0xFFFF,
			.flags = word >> 48,
			.header = header,
		};
		used += length - HEADER;
		advance(ring, length + FOOTER);
	}
	/* After every burst; single packets when all known ones are read (as Linux's iterator), or a quarter of the ring is held. */
	if (received && (count > 1 || !ring->room || held(ring) > ring->size / 4))
		commit(ring);
	return received;
}

static void pin(int core)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(core, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("sched_setaffinity");
}

static struct ring map_ring(int fd)
{
	char *base = mmap(NULL, PAGE + 2 * DATA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int flags = MAP_SHARED | MAP_FIXED | MAP_POPULATE, protection = PROT_READ | PROT_WRITE;

	if (base == MAP_FAILED || mmap(base, PAGE + DATA, protection, flags, fd, 0) == MAP_FAILED ||
	    mmap(base + PAGE + DATA, DATA, protection, flags, fd, PAGE) == MAP_FAILED)
		die("mmap");
	return (struct ring){ .control = (struct control *)base, .data = base + PAGE, .size = DATA };
}

static void write_packets(struct ring ring, int size, int burst, long packets)
{
	static char memory[BURST_MAX * SLOT];
	struct row rows[BURST_MAX];

	memset(memory, 1, sizeof(memory));
	for (int at = 0; at < burst; at++)
		rows[at] = (struct row){ .offset = at * SLOT, .length = size, .kind = INBAND, .header = HEADER };
	while (packets > 0) {
		int sent = send_burst(&ring, memory, rows, packets < burst ? packets : burst);
		if (!sent)
			rest();
		packets -= sent;
	}
	exit(0);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + 1e-9 * time.tv_nsec;
}

int main(int argc, char **argv)
{
	static char memory[BURST_MAX * SLOT];
	struct row rows[BURST_MAX];

	if (argc != 6)
		return 2;
	int size = atoi(argv[3]), burst = atoi(argv[4]);
	long packets = atol(argv[5]), left = packets;
	int fd = memfd_create("ring", 0);
	if (size < 0 || size > SLOT - HEADER || burst < 1 || burst > BURST_MAX || fd < 0 || ftruncate(fd, PAGE + DATA))
		die("arguments");
	struct ring ring = map_ring(fd);
	ring.control->features = 1;
	ring.control->mask = 1; /* both poll */
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (!child) {
		pin(atoi(argv[1]));
		write_packets(map_ring(fd), size, burst, packets);
	}
	pin(atoi(argv[2]));
	memset(memory, 1, sizeof(memory));
	while (!look_for_packets(&ring))
		rest();
	double begin = now();
	while (left > 0 && !ring.broken) {
		int received = receive_burst(&ring, memory, rows, burst);
		if (!received)
			rest();
		left -= received;
	}
	double seconds = now() - begin;
	int status;
	if (waitpid(child, &status, 0) < 0 || status || ring.broken)
		return 1;
	printf("%.3f\n", packets / seconds / 1e6);
	return 0;
}
