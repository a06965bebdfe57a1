// SPDX-License-Identifier: MIT
/*
 * The boot-sector guest after its boot sector: it runs the load of selfcheck.h on all memory above 1 MiB.  Parameters
 * in the image may limit the memory, which then comes from all ranges of the memory map in turn.  Serial port 1 carries
 * the same lines and commands as the Linux guest's.  The guest runs in ring 3 without interrupts, so it cannot sleep:
 * a load with a rate spins between writes.
 */
#include "selfcheck.h"

#define MAP_COUNT (*(volatile uint32_t *)0x0500)
#define MAP ((volatile struct map_entry *)0x0508)
#define LOWEST 0x100000ull
#define HIGHEST (64ull << 30) /* mapped by the entry code */
#define RANGES 16
#define PORT 0x3f8
#define POWER 0x604 /* ACPI power control, where the firmware of QEMU's PCs puts it */
#define PIT_HZ 1193182ull

struct map_entry {
	uint64_t start, length;
	uint32_t type, attributes;
} __attribute__((packed));

/* The builder finds these by the magic word and patches them. */
__attribute__((used)) static volatile const struct {
	char magic[8];
	uint64_t size_bytes, rate, sweep_seconds;
	uint32_t pattern, reserved;
} parameters = { .magic = { 'M', 'G', 'D', 'L', 'O', 'A', 'D', '1' }, .sweep_seconds = 10 };

static struct range {
	uint64_t start, blocks;
} ranges[RANGES];
static unsigned int range_count;
static uint64_t ticks_per_ms;
static char output[4096]; /* output that the serial port has not accepted yet */
static unsigned int output_start, output_end;

void load_main(void);

static inline void out8(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
	uint8_t value;

	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline uint64_t ticks(void)
{
	uint32_t low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return (uint64_t)high << 32 | low;
}

/* ---- the serial port: never wait for it, since a console that nobody reads must not stop the load */

static void push_output(void)
{
	int room = 16; /* the size of the port's queue, once the port reports it empty */

	if (output_start == output_end || !(in8(PORT + 5) & 0x20))
		return;
	while (room-- && output_start != output_end)
		out8(PORT, (uint8_t)output[output_start++ % sizeof(output)]);
}

static void say_char(char c)
{
	if (output_end - output_start < sizeof(output))
		output[output_end++ % sizeof(output)] = c;
}

static void say(const char *text)
{
	while (*text)
		say_char(*text++);
}

static void say_number(uint64_t value, unsigned int base)
{
	char digits[24];
	int n = 0;

	do {
		digits[n++] = "0123456789abcdef"[value % base];
		value /= base;
	} while (value);
	while (n)
		say_char(digits[--n]);
}

static void say_field(const char *name, uint64_t value)
{
	say(name);
	say_number(value, 10);
}

/* Print ticks as milliseconds with three decimals. */
static void say_ms(const char *name, uint64_t value)
{
	uint64_t us = value * 1000 / ticks_per_ms;

	say_field(name, us / 1000);
	say_char('.');
	say_char((char)('0' + us / 100 % 10));
	say_char((char)('0' + us / 10 % 10));
	say_char((char)('0' + us % 10));
}

/* Return 's', 'r' or 'q' when the line of that command is complete. */
static char next_command(void)
{
	static char first;
	char c;

	while (in8(PORT + 5) & 1) {
		c = (char)in8(PORT);
		if (c == '\n' || c == '\r') {
			c = first;
			first = 0;
			if (c)
				return c;
		} else if (!first) {
			first = c;
		}
	}
	return 0;
}

/* ---- time */

/* Measure the frequency of the time stamp counter over 20 ms of the timer chip's second channel. */
static void calibrate(void)
{
	uint32_t count = PIT_HZ / 50;
	uint64_t start;

	out8(0x61, (uint8_t)((in8(0x61) & ~2u) | 1u));
	out8(0x43, 0xb0);
	out8(0x42, (uint8_t)count);
	out8(0x42, (uint8_t)(count >> 8));
	start = ticks();
	while (!(in8(0x61) & 0x20))
		;
	ticks_per_ms = (ticks() - start) / 20;
	if (ticks_per_ms == 0)
		ticks_per_ms = 1;
}

/* ---- memory */

static volatile uint64_t *block_at(void *context, uint64_t index)
{
	unsigned int i = 0;

	(void)context;
	while (index >= ranges[i].blocks)
		index -= ranges[i++].blocks;
	return (volatile uint64_t *)(ranges[i].start + index * SC_BLOCK_BYTES);
}

static uint64_t find_memory(void)
{
	uint64_t blocks = 0;

	for (uint32_t i = 0; i < MAP_COUNT && range_count < RANGES; i++) {
		uint64_t start = MAP[i].start, end = MAP[i].start + MAP[i].length;

		if (MAP[i].type != 1)
			continue;
		if (start < LOWEST)
			start = LOWEST;
		if (end > HIGHEST)
			end = HIGHEST;
		start = (start + SC_BLOCK_BYTES - 1) & ~(uint64_t)(SC_BLOCK_BYTES - 1);
		end &= ~(uint64_t)(SC_BLOCK_BYTES - 1);
		if (end <= start)
			continue;
		ranges[range_count].start = start;
		ranges[range_count++].blocks = (end - start) / SC_BLOCK_BYTES;
		blocks += (end - start) / SC_BLOCK_BYTES;
	}
	return blocks;
}

/* Take the counters from the first range, then the same share of the requested memory from every range. */
static void lay_out(struct sc_load *load)
{
	uint64_t blocks = find_memory(), wanted = parameters.size_bytes / SC_BLOCK_BYTES;
	uint64_t own = blocks / SC_BLOCK_WORDS + 1;

	load->expected = (uint64_t *)ranges[0].start;
	ranges[0].start += own * SC_BLOCK_BYTES;
	ranges[0].blocks -= own;
	blocks -= own;
	if (wanted && wanted < blocks) {
		uint64_t all = blocks;

		blocks = 0;
		for (unsigned int i = 0; i < range_count; i++) {
			ranges[i].blocks = ranges[i].blocks * wanted / all;
			blocks += ranges[i].blocks;
		}
	}
	load->blocks = blocks;
}

/* ---- the load */

static void say_mismatch(const struct sc_mismatch *m)
{
	say_field("CORRUPT {\"memory\":\"ram\",\"block\":", m->index);
	say_field(",\"word\":", m->word);
	say(",\"found\":\"");
	say_number(m->found, 16);
	say("\",\"wanted\":\"");
	say_number(m->wanted, 16);
	say_field("\",\"counter\":", m->counter);
	say("}\n");
}

void load_main(void)
{
	struct sc_load load = { .block = block_at, .random = 0x1234567 };
	uint64_t rate = parameters.rate, sweep_ms = parameters.sweep_seconds * 1000;
	uint64_t started, last, reported = 0, listened = 0, gap = 0, stall = 0, written = 0, swept = 0;
	int corrupt_said = 0;

	load.pattern = (enum sc_pattern)parameters.pattern;
	out8(PORT + 1, 0); /* no interrupts; 115200 baud; queues on */
	out8(PORT + 3, 0x80);
	out8(PORT, 1);
	out8(PORT + 1, 0);
	out8(PORT + 3, 3);
	out8(PORT + 2, 7);
	out8(PORT + 4, 3);
	calibrate();
	lay_out(&load);
	sc_fill(&load);
	say_field("READY {\"blocks\":", load.blocks);
	say(",\"disk_blocks\":0}\n");

	started = last = ticks();
	for (;;) {
		uint64_t now = ticks(), ms = (now - started) / ticks_per_ms, due;

		if (now > last && now - last > gap)
			gap = now - last;
		last = now;
		if (load.pattern != SC_IDLE && rate == 0) {
			for (int i = 0; i < 64; i++)
				sc_operate(&load);
		} else if (load.pattern != SC_IDLE) {
			/* Do not catch up on writes that a pause prevented, beyond 20 ms worth of them. */
			due = ms * rate / 1000;
			if (due - written > rate / 50 + 1)
				written = due - (rate / 50 + 1);
			for (int i = 0; i < 64 && written < due; i++, written++)
				sc_operate(&load);
		}
		if (sweep_ms) {
			due = ms * load.blocks / sweep_ms;
			if (due - swept > load.blocks / 64 + 1)
				swept = due - (load.blocks / 64 + 1);
			for (int i = 0; i < 64 && swept < due; i++, swept++)
				sc_sweep_some(&load, 1);
		}
		if (gap > stall)
			stall = gap;
		if (load.errors && !corrupt_said++)
			say_mismatch(&load.first);
		if (now - reported >= 500 * ticks_per_ms) {
			reported = now;
			say_ms("LOAD {\"seconds\":", (now - started) / 1000);
			say_field(",\"operations\":", load.operations);
			say_field(",\"sweeps\":", load.sweeps);
			say_field(",\"errors\":", load.errors);
			say_ms(",\"stall_ms\":", stall);
			say_ms(",\"gap_ms\":", gap);
			say("}\n");
			gap = 0;
		}
		if (now - listened >= 2 * ticks_per_ms) {
			listened = now;
			push_output();
			switch (next_command()) {
			case 's':
				due = sc_sweep_all(&load);
				say_field("SWEPT {\"blocks\":", load.blocks);
				say_field(",\"wrong\":", due);
				say_field(",\"errors\":", load.errors);
				say("}\n");
				last = ticks(); /* our own doing, not a stall */
				break;
			case 'r':
				stall = gap = 0;
				break;
			case 'q':
				__asm__ volatile("outw %0, %1" : : "a"((uint16_t)0x2000), "Nd"((uint16_t)POWER));
				break;
			}
		}
		if (rate || load.pattern == SC_IDLE)
			__asm__ volatile("pause");
	}
}
