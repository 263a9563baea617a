// The kernels themselves on a CPU: kernels.cu as it stands, run thread by thread.
//
// A thread is a fiber, which gives way at barriers and shuffles. Lanes of a warp, warps of a thread block and thread
// blocks take turns in rising or in falling order: a result that depends on the order lacks a barrier. What of CUDA the
// kernels use is declared here.

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <utility>
#include <vector>

namespace {

struct Dimensions {
    unsigned x, y, z;
};

Dimensions threadIdx, blockIdx, blockDim, gridDim;

enum Status { OK, UNKNOWN_ENTRY, BAD_ARGUMENTS, BAD_GRID, DIVERGED };
enum class At { WORK, BARRIER, SHUFFLE, END };

constexpr int WARP = 32, STACK = 64 << 10;

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    At at;
    int shuffles;
    float offered[2];  // one is read while the next is written
};

struct Multiprocessor {
    std::vector<Thread> threads;
    std::vector<float> shared;
    std::function<void()> kernel;
    ucontext_t scheduler;
    unsigned current;
} now;

void wait(At at) {
    Thread& thread = now.threads[now.current];
    thread.at = at;
    swapcontext(&thread.context, &now.scheduler);
}

void begin() {
    now.kernel();
    now.threads[now.current].at = At::END;
}

// Are all of so many threads at such a place?
bool all_at(At at, unsigned first, unsigned count) {
    const auto begins = now.threads.begin() + first;
    return std::all_of(begins, begins + count, [at](const Thread& thread) { return thread.at == at; });
}

// As far as it comes without other warps: that far ahead of them it may be on a GPU, too.
void run_warp(unsigned warp, bool falling) {
    do {
        for (unsigned i = 0; i < WARP; i++) {
            now.current = warp + (falling ? WARP - 1 - i : i);
            threadIdx = {now.current, 0, 0};
            Thread& thread = now.threads[now.current];
            if (thread.at == At::SHUFFLE) thread.at = At::WORK;
            if (thread.at == At::WORK) swapcontext(&now.scheduler, &thread.context);
        }
    } while (all_at(At::SHUFFLE, warp, WARP));
}

Status run_block(bool falling) {
    for (Thread& thread : now.threads) {
        getcontext(&thread.context);
        thread.stack.resize(STACK);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = &now.scheduler;
        makecontext(&thread.context, begin, 0);
        thread.shuffles = 0;
    }
    const unsigned count = static_cast<unsigned>(now.threads.size());
    do {
        for (Thread& thread : now.threads) thread.at = At::WORK;
        for (unsigned i = 0; i < count; i += WARP) run_warp(falling ? count - WARP - i : i, falling);
    } while (all_at(At::BARRIER, 0, count));
    return all_at(At::END, 0, count) ? OK : DIVERGED;
}

// -- what CUDA declares

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using std::min;

[[maybe_unused]] void __syncthreads() { wait(At::BARRIER); }

float exchanged(float value, unsigned lane) {
    Thread* const warp = &now.threads[now.current / WARP * WARP];
    Thread& mine = now.threads[now.current];
    const int turn = mine.shuffles++ % 2;
    mine.offered[turn] = value;
    wait(At::SHUFFLE);
    return warp[lane % WARP].offered[turn];
}

[[maybe_unused]] float __shfl_xor_sync(unsigned, float value, unsigned mask) {
    return exchanged(value, threadIdx.x ^ mask);
}

[[maybe_unused]] float __shfl_sync(unsigned, float value, unsigned lane) { return exchanged(value, lane); }

[[maybe_unused]] float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float* dynamic_shared() { return now.shared.data(); }

}  // namespace

#include "kernels.cu"

namespace {

using Launch = std::function<void(void* const*)>;

struct Entry {
    const char* name;
    int arguments;
    Launch run;
};

template <class... A, size_t... I>
void call(void (*kernel)(A...), void* const* arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A>
Entry entry(const char* name, void (*kernel)(A...)) {
    const auto run = [kernel](void* const* arguments) { call(kernel, arguments, std::index_sequence_for<A...>()); };
    return {name, static_cast<int>(sizeof...(A)), run};
}

#undef CONV
#undef CONV_WITH_RESIDUAL
#undef INPUT_GRADIENT
#undef WEIGHT_GRADIENT
#undef POOL
#undef POOL_ANY
#define NAMED(name) entry(#name, name),
#define CONV(form, Form, type, T, W) NAMED(depthwise_temporal_conv_##form##_##type##_##W)
#define CONV_WITH_RESIDUAL(form, Form, type, T, W) NAMED(depthwise_temporal_conv_with_residual_##form##_##type##_##W)
#define INPUT_GRADIENT(type, T, W) NAMED(depthwise_temporal_conv_input_gradient_##type##_##W)
#define WEIGHT_GRADIENT(N, type, T, W) NAMED(depthwise_temporal_conv_weight_gradient##N##_##type##_##W)
#define POOL(type, T, W) NAMED(weighted_average_pool_##type)
#define POOL_ANY(type, T, W) NAMED(weighted_average_pool_any_##type##_##W)

const Entry ENTRIES[] = {LITEFRAME_ENTRIES};

}  // namespace

// Arguments are pointers to each argument, as cuLaunchKernel takes them, and their number, or -1 where it is not known;
// `shared` counts bytes of dynamic shared memory.
// Returns 0, or what can't be done:
//     1: no such entry; 2: another number of arguments; 3: an empty grid, or threads that 32 does not divide;
//     4: some threads wait where others never come
extern "C" __attribute__((visibility("default"))) int liteframe_launch(
    const char* name, const unsigned* grid, unsigned threads, unsigned shared, void* const* arguments, int count,
    int falling
) {
    const auto found = std::find_if(std::begin(ENTRIES), std::end(ENTRIES), [name](const Entry& entry) {
        return std::strcmp(entry.name, name) == 0;
    });
    if (found == std::end(ENTRIES)) return UNKNOWN_ENTRY;
    if (count >= 0 && found->arguments != count) return BAD_ARGUMENTS;
    const long long blocks = static_cast<long long>(grid[0]) * grid[1] * grid[2];
    if (!blocks || !threads || threads > 1024 || threads % WARP) return BAD_GRID;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    now.threads.resize(threads);
    now.kernel = [found, arguments] { found->run(arguments); };
    Status status = OK;
    for (long long i = 0; i < blocks && status == OK; i++) {
        const long long n = falling ? blocks - 1 - i : i;
        blockIdx = {
            static_cast<unsigned>(n % grid[0]), static_cast<unsigned>(n / grid[0] % grid[1]),
            static_cast<unsigned>(n / grid[0] / grid[1])
        };
        now.shared.assign(shared / sizeof(float), __int_as_float(0x7fc00000));
        status = run_block(falling);
    }
    now = {};
    return status;
}
