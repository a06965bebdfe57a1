/* SPDX-License-Identifier: MIT */
/* Tests of the token bucket.  They use a simulated clock. */
#include "bucket.h"
#include "check.h"

#define SECOND 1000000000ull

/* Send pieces as fast as the bucket allows from `from` to `until`; returns the bytes sent. */
static uint64_t send_until(struct mgd_bucket *bucket, uint64_t from, uint64_t until, uint64_t piece)
{
	uint64_t now = from, sent = 0;

	while (now < until) {
		uint64_t wait = mgd_bucket_wait_ns(bucket, now);

		if (wait) {
			now += wait;
			continue;
		}
		mgd_bucket_charge(bucket, now, piece);
		sent += piece;
	}
	return sent;
}

static void check_within_5_percent(uint64_t sent, uint64_t expected)
{
	CHECK(sent >= expected * 95 / 100);
	CHECK(sent <= expected * 105 / 100);
}

static void test_rate_is_held(void)
{
	const uint64_t rates[] = {1000 * 1000, 125 * 1000 * 1000, 10ull * 1000 * 1000 * 1000};

	for (int i = 0; i < 3; i++) {
		struct mgd_bucket bucket;

		mgd_bucket_init(&bucket);
		mgd_bucket_change(&bucket, 100 * SECOND, rates[i]);
		check_within_5_percent(send_until(&bucket, 100 * SECOND, 104 * SECOND, mgd_bucket_piece_bytes(&bucket)),
				       4 * rates[i]);
		mgd_bucket_fini(&bucket);
	}
}

static void test_idle_time_is_not_saved_up(void)
{
	struct mgd_bucket bucket;

	mgd_bucket_init(&bucket);
	mgd_bucket_change(&bucket, 100 * SECOND, 1000 * 1000);
	check_within_5_percent(send_until(&bucket, 1000 * SECOND, 1001 * SECOND, 4096), 1000 * 1000);
	mgd_bucket_fini(&bucket);
}

static void test_change_acts_at_once(void)
{
	struct mgd_bucket bucket;

	mgd_bucket_init(&bucket);
	mgd_bucket_change(&bucket, 100 * SECOND, 1000);
	mgd_bucket_charge(&bucket, 100 * SECOND, 1000 * 1000); /* 1000 s worth */
	CHECK(mgd_bucket_wait_ns(&bucket, 100 * SECOND) > 990 * SECOND);
	mgd_bucket_change(&bucket, 100 * SECOND, 1000 * 1000);
	CHECK(mgd_bucket_wait_ns(&bucket, 100 * SECOND) <= SECOND);
	check_within_5_percent(send_until(&bucket, 100 * SECOND, 111 * SECOND, 4096), 10 * 1000 * 1000);
	mgd_bucket_change(&bucket, 111 * SECOND, 0);
	CHECK_EQUAL(mgd_bucket_wait_ns(&bucket, 111 * SECOND), 0);
	mgd_bucket_fini(&bucket);
}

static bool yes(void *context)
{
	(void)context;
	return true;
}

static void test_exempt_and_closed_do_not_wait(void)
{
	struct mgd_bucket bucket;

	mgd_bucket_init(&bucket);
	mgd_bucket_set(&bucket, 1);
	mgd_bucket_take(&bucket, 1 << 20, NULL, NULL); /* sent on credit: a million seconds of it */
	mgd_bucket_take(&bucket, 1 << 20, yes, NULL);
	mgd_bucket_close(&bucket, true);
	mgd_bucket_take(&bucket, 1 << 20, NULL, NULL);
	mgd_bucket_fini(&bucket);
}

int main(void)
{
	RUN(test_rate_is_held);
	RUN(test_idle_time_is_not_saved_up);
	RUN(test_change_acts_at_once);
	RUN(test_exempt_and_closed_do_not_wait);
	return 0;
}
