#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace craton {
namespace {

using Clock = std::chrono::steady_clock;

// How long to look before sleeping. A worker looks for longer than the other work between two layers of a decode step
// takes (some 100 us): asleep, it comes too late for all of them. The caller looks for about what a wake-up costs.
constexpr std::chrono::microseconds kWorkerPatience{300};
constexpr std::chrono::microseconds kCallerPatience{20};

// Where other programs keep the processors busy, waiting for an interrupted worker can take longer than doing its
// share. The caller then works alone for this many times what it lost, so that at most a tenth of its time is lost.
constexpr int kAvoidance = 10;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// yields: lets others have the processor between two looks, those above all who do the work that is waited for.
template <typename Condition>
bool spin_until(const Condition& condition, std::chrono::microseconds patience, bool yields) {
    if (condition()) return true;
    const Clock::time_point end = Clock::now() + patience;
    do {
        if (yields) sched_yield();
        for (int i = 0; i < 8; ++i) {
            pause();
            if (condition()) return true;
        }
    } while (Clock::now() < end);
    return false;
}

// The state of a job in one word, so that a claim is one compare-and-swap and a worker that comes late, with the word
// of an earlier job in hand, claims nothing.
struct Ticket {
    uint64_t word;

    static Ticket of(uint64_t job, uint64_t helpers, uint64_t chunks) {
        return {job << 40 | helpers << 32 | chunks << 16};
    }
    uint64_t job() const { return word >> 40; }
    int32_t helpers() const { return int32_t(word >> 32 & 0xff); }
    uint64_t chunks() const { return word >> 16 & 0xffff; }
    uint64_t next() const { return word & 0xffff; }
    bool open_to(int32_t helper) const { return next() < chunks() && helper < helpers(); }
};

class Pool {
public:
    void run(int32_t threads, int64_t chunks, Chunk chunk, const void* context) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        const Clock::time_point start = Clock::now();
        if (!owner || start < alone_until_ || !grow(threads - 1)) {
            for (int64_t i = 0; i < chunks; ++i) chunk(context, i);
            return;
        }
        chunk_ = chunk;
        context_ = context;
        unfinished_.store(chunks, std::memory_order_relaxed);
        const uint64_t job = Ticket{ticket_.load(std::memory_order_relaxed)}.job() + 1;
        ticket_.store(Ticket::of(job, uint64_t(threads - 1), uint64_t(chunks)).word, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        work(kCaller);
        const auto finished = [this] { return unfinished_.load(std::memory_order_seq_cst) == 0; };
        if (spin_until(finished, kCallerPatience, false)) return;
        const Clock::time_point waiting = Clock::now();
        {
            // A worker was interrupted within its chunk: leave this processor to it.
            std::unique_lock<std::mutex> lock(sleep_);
            caller_sleeps_.store(true, std::memory_order_seq_cst);
            done_.wait(lock, finished);
            caller_sleeps_.store(false, std::memory_order_relaxed);
        }
        const Clock::time_point end = Clock::now();
        const Clock::duration lost = (end - waiting) - (threads - 1) * (waiting - start);
        if (lost > Clock::duration::zero()) alone_until_ = end + kAvoidance * lost;
    }

private:
    static constexpr int32_t kCaller = -1;  // open to every job

    // Have `helpers` workers, or as many as the system gives; false without any.
    bool grow(int32_t helpers) {
        if (workers_ >= helpers) return true;
        sigset_t all, before;  // signals are for the program's own threads
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; workers_ < helpers; ++workers_) std::thread([this, helper = workers_] { serve(helper); }).detach();
        } catch (const std::system_error&) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        return workers_ > 0;
    }

    void serve(int32_t helper) {
        const auto called = [this, helper] { return Ticket{ticket_.load(std::memory_order_seq_cst)}.open_to(helper); };
        for (;;) {
            work(helper);
            if (spin_until(called, kWorkerPatience, true)) continue;
            std::unique_lock<std::mutex> lock(sleep_);
            sleepers_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, called);
            sleepers_.fetch_sub(1, std::memory_order_relaxed);
        }
    }

    // Claim and run chunks of the present job until none is left.
    void work(int32_t helper) {
        Ticket ticket{ticket_.load(std::memory_order_acquire)};
        while (ticket.open_to(helper)) {
            if (!ticket_.compare_exchange_weak(ticket.word, ticket.word + 1, std::memory_order_acq_rel)) continue;
            chunk_(context_, int64_t(ticket.next()));
            if (unfinished_.fetch_sub(1, std::memory_order_seq_cst) == 1 &&
                caller_sleeps_.load(std::memory_order_seq_cst)) {
                std::lock_guard<std::mutex> lock(sleep_);
                done_.notify_one();
            }
            ticket.word = ticket_.load(std::memory_order_acquire);
        }
    }

    // Used while owner_ is held.
    std::mutex owner_;
    int32_t workers_ = 0;
    Clock::time_point alone_until_{};  // help cost more than it gave: do without it until then

    // The job: written by the caller before the ticket, read after a claim, which keeps the job unfinished.
    Chunk chunk_ = nullptr;
    const void* context_ = nullptr;

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> unfinished_{0};

    alignas(64) std::mutex sleep_;
    std::condition_variable wake_, done_;
    std::atomic<int32_t> sleepers_{0};
    std::atomic<bool> caller_sleeps_{false};
};

// Never destroyed: workers may still be looking at it while the process ends, and a fork's child must not touch its
// locks.
std::atomic<Pool*> pool{nullptr};

[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });

Pool& the_pool() {
    Pool* present = pool.load(std::memory_order_acquire);
    if (present) return *present;
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(present, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *present;
}

}  // namespace

void run_chunks(int32_t threads, int64_t chunks, Chunk chunk, const void* context) {
    the_pool().run(threads, chunks, chunk, context);
}

}  // namespace craton
