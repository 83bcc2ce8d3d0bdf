// Read bandwidth of main memory: threads sum disjoint parts of one buffer that no cache holds.
//
//   cc -O3 -march=native -pthread read_bandwidth.c -o read_bandwidth
//   ./read_bandwidth [THREADS [MIB [PASSES]]]        (default 2 1024 5)
//
// Prints JSON: the bytes read in a pass and each pass's time in ns, from the moment every thread is
// ready until the last one is done. One more pass, not timed, comes first: it maps the pages.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
    const uint64_t *words;
    size_t count;
    int passes;
    pthread_barrier_t *barrier;
    uint64_t sum; // printed, so that no compiler may drop the reads
} part;

static uint64_t sum_words(const uint64_t *words, size_t count) {
    uint64_t lanes[32] = {0}; // independent sums: the loop waits for memory, not for an adder
    for (size_t i = 0; i + 32 <= count; i += 32)
        for (size_t lane = 0; lane < 32; lane++)
            lanes[lane] += words[i + lane];
    uint64_t sum = 0;
    for (size_t lane = 0; lane < 32; lane++)
        sum += lanes[lane];
    return sum;
}

static void *read_part(void *argument) {
    part *mine = argument;
    for (int pass = 0; pass <= mine->passes; pass++) {
        pthread_barrier_wait(mine->barrier);
        mine->sum += sum_words(mine->words, mine->count);
        pthread_barrier_wait(mine->barrier);
    }
    return NULL;
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static long argument(int argc, char **argv, int index, long fallback) {
    const long value = argc > index ? strtol(argv[index], NULL, 10) : fallback;
    if (value < 1) {
        fprintf(stderr, "usage: read_bandwidth [THREADS [MIB [PASSES]]], each at least 1\n");
        exit(2);
    }
    return value;
}

int main(int argc, char **argv) {
    const long threads = argument(argc, argv, 1, 2);
    const long mib = argument(argc, argv, 2, 1024);
    const long passes = argument(argc, argv, 3, 5);
    // whole cache lines per thread, so the unrolled loop leaves nothing out
    const size_t words_each = ((size_t)mib << 20) / sizeof(uint64_t) / (size_t)threads / 32 * 32;
    const size_t words = words_each * (size_t)threads;
    uint64_t *buffer = aligned_alloc(4096, (words * sizeof(uint64_t) + 4095) / 4096 * 4096);
    pthread_t *handles = calloc((size_t)threads, sizeof *handles);
    part *parts = calloc((size_t)threads, sizeof *parts);
    if (!buffer || !handles || !parts) {
        fprintf(stderr, "read_bandwidth: no memory for %ld MiB\n", mib);
        return 1;
    }
    for (size_t i = 0; i < words; i++)
        buffer[i] = i; // untouched pages would all be the one zero page

    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1);
    for (long i = 0; i < threads; i++) {
        parts[i] = (part){buffer + (size_t)i * words_each, words_each, (int)passes, &barrier, 0};
        if (pthread_create(&handles[i], NULL, read_part, &parts[i]) != 0) {
            fprintf(stderr, "read_bandwidth: no thread %ld\n", i);
            return 1;
        }
    }
    printf("{\"threads\": %ld, \"bytes\": %zu, \"samples_ns\": [", threads, words * sizeof *buffer);
    for (long pass = 0; pass <= passes; pass++) {
        const int64_t start = now_ns();
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
        const int64_t elapsed = now_ns() - start;
        if (pass > 0)
            printf("%s%lld", pass > 1 ? ", " : "", (long long)elapsed);
    }
    uint64_t sum = 0;
    for (long i = 0; i < threads; i++) {
        pthread_join(handles[i], NULL);
        sum += parts[i].sum;
    }
    printf("], \"checksum\": %llu}\n", (unsigned long long)sum);
    return 0;
}
