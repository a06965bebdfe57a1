/* SPDX-License-Identifier: MIT */
/*
 * What every thread of the engines needs: a start without the daemon's signals, a scoped lock, and scheduling.  Nothing
 * here knows what the threads do.
 */
#pragma once

#include <pthread.h>

#include "migrated.h"

/* Call pthread_create with every signal blocked, since signals belong to the daemon, except for those that a thread
 * raises itself, such as SIGBUS: if blocked, they would kill the process without a trace.  name: at most 15
 * characters. */
int mgd_thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *argument, struct mgd_error *err);

/*
 * Called by a thread that works only while a guest thread waits for it: little work, needed at once.  On a busy host it
 * would otherwise wait for a whole time slice of the running thread.  A short slice of its own (Linux 6.12; ignored
 * before) lets it run early without a larger share; a better nice value helps too, if permitted.  Not a real-time
 * class: the network controls how much such a thread does.
 */
void mgd_thread_low_latency(void);

static inline pthread_mutex_t *mgd_lock(pthread_mutex_t *lock)
{
	pthread_mutex_lock(lock);
	return lock;
}

static inline void mgd_unlock(pthread_mutex_t **held)
{
	pthread_mutex_unlock(*held);
}

/* Hold the lock until the end of the enclosing block, however control leaves it. */
#define MGD_HOLD(lock) __attribute__((cleanup(mgd_unlock), unused)) pthread_mutex_t *held_lock = mgd_lock(lock)
/* Hold it for the block that follows, which must not be left with break. */
#define MGD_LOCKED(lock)                                                                                               \
	for (pthread_mutex_t * held_lock __attribute__((cleanup(mgd_unlock))) = mgd_lock(lock), *once = held_lock;     \
	     once; once = NULL)
