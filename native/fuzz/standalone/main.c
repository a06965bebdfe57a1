/* SPDX-License-Identifier: MIT */
/*
 * A fuzzer's main for systems without libFuzzer.  It replays the files (or directories of files) it is given, then
 * mutates valid frames blindly.
 *
 *   fuzz_frame [-runs=N] [-max_total_time=SECONDS] [-seed=N] [FILE …]
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "frame.h"

#define INPUT_MAX_BYTES (64 * 1024)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t state;

static uint64_t next_random(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static int replay(const char *path)
{
	static uint8_t input[INPUT_MAX_BYTES];
	DIR *directory = opendir(path);
	struct dirent *entry;
	FILE *file;
	size_t bytes;

	if (directory) {
		while ((entry = readdir(directory))) {
			char name[4096];

			snprintf(name, sizeof(name), "%s/%s", path, entry->d_name);
			if (entry->d_name[0] != '.' && replay(name))
				return 1;
		}
		closedir(directory);
		return 0;
	}
	file = fopen(path, "rb");
	if (!file) {
		perror(path);
		return 1;
	}
	bytes = fread(input, 1, sizeof(input), file);
	fclose(file);
	LLVMFuzzerTestOneInput(input, bytes);
	return 0;
}

/* Build a frame that is usually valid, with up to four wrong bytes. */
static void mutate_one(void)
{
	static const uint64_t hashes[MGD_CHUNK_BLOCKS];
	static const uint8_t secret[MGD_SECRET_BYTES];
	struct mgd_frame frame = {.kind = (uint8_t)(next_random() % 4), .region = (uint32_t)(next_random() % 5)};
	uint8_t head[MGD_FRAME_HEAD_MAX_BYTES] = {0};
	size_t bytes;

	frame.flags = next_random() % 3 ? 0 : (uint16_t)(next_random() % 16);
	frame.block_count = 1 + (uint32_t)(next_random() % MGD_CHUNK_BLOCKS);
	frame.first_block = next_random() % 4 * 512;
	for (uint32_t word = 0; word < frame.block_count / 64; word++) {
		frame.present[word] = next_random() & next_random();
		frame.zero[word] = next_random() & ~frame.present[word];
	}
	frame.payload_bytes = mgd_frame_present_count(&frame) * MGD_BLOCK_BYTES;
	bytes = mgd_frame_encode(&frame, hashes, secret, head);
	for (uint64_t changes = next_random() % 5; changes; changes--)
		head[next_random() % bytes] = (uint8_t)next_random();
	LLVMFuzzerTestOneInput(head, next_random() % 8 ? bytes : next_random() % bytes);
}

int main(int argc, char **argv)
{
	unsigned long long runs = 200000, seed = 1, seconds = 0;
	time_t begin = time(NULL);

	for (int i = 1; i < argc; i++) {
		if (sscanf(argv[i], "-runs=%llu", &runs) == 1 || sscanf(argv[i], "-seed=%llu", &seed) == 1 ||
		    sscanf(argv[i], "-max_total_time=%llu", &seconds) == 1)
			continue;
		if (argv[i][0] == '-')
			continue; /* libFuzzer's other options have no meaning here */
		if (replay(argv[i]))
			return 1;
	}
	state = seed * 0x9e3779b97f4a7c15ull | 1;
	for (unsigned long long run = 0; run < runs; run++) {
		if (seconds && (unsigned long long)(time(NULL) - begin) >= seconds)
			runs = run;
		else
			mutate_one();
	}
	printf("%llu runs, seed %llu\n", runs, seed);
	return 0;
}
