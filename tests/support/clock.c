/* Loaded before a program's own libraries: its time of day is CLOCK_OFF_S seconds ahead; clocks that only count are as they are. */

#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    const char *off = clock == CLOCK_REALTIME ? getenv("CLOCK_OFF_S") : NULL;
    if (!failed && off)
        now->tv_sec += atol(off);
    return failed;
}
