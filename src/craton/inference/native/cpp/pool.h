// A few threads that share out the chunks of one job at a time.
//
// Workers look for the next job for a short while and then sleep, so an idle process costs nothing and a loaded machine
// is not fought over. Chunks are claimed one by one: a worker that the system does not run in time claims none, and the
// caller, which works too, is not held up by it. Where workers are interrupted so often that they cost more than they
// give, the caller does without them for a while. Which thread computes a chunk never changes the result.
//
// The pool serves one caller at a time; a second caller meanwhile does its whole job alone, which on a busy machine is
// the fair share. After a fork the child starts with a pool of its own.
#pragma once

#include <cstdint>

namespace craton {

constexpr int32_t kMostThreads = 256;
constexpr int64_t kMostChunks = 65535;

using Chunk = void (*)(const void* context, int64_t index);

// Run chunk(context, 0 .. chunks - 1) on at most `threads` threads, the caller's among them; chunks <= kMostChunks.
void run_chunks(int32_t threads, int64_t chunks, Chunk chunk, const void* context);

// Call body(begin, end) on pieces of 0 .. count that are `step` long (the last one may be short).
template <typename Body>
void share_out(int32_t threads, int64_t count, int64_t step, const Body& body) {
    if (count <= 0) return;
    if (threads <= 1 || count <= step) return body(int64_t(0), count);
    if (count / step >= kMostChunks) step = count / kMostChunks + 1;
    struct Job {
        const Body& body;
        int64_t count, step;
    } job{body, count, step};
    run_chunks(
        threads, (count + step - 1) / step,
        [](const void* context, int64_t index) {
            const Job& j = *static_cast<const Job*>(context);
            const int64_t begin = index * j.step, end = begin + j.step;
            j.body(begin, end < j.count ? end : j.count);
        },
        &job);
}

// Call body(begin, end) on a few pieces a thread of 0 .. count, each a multiple of `grain` long.
template <typename Body>
void parallel_for(int32_t threads, int64_t count, int64_t grain, const Body& body) {
    // Several pieces a thread, so that one that is interrupted leaves its share to the others.
    constexpr int64_t kPiecesPerThread = 8;
    const int64_t pieces = (count + grain - 1) / grain;
    const int64_t wanted = pieces < threads * kPiecesPerThread ? pieces : threads * kPiecesPerThread;
    share_out(threads, count, wanted > 0 ? (pieces + wanted - 1) / wanted * grain : 1, body);
}

}  // namespace craton
